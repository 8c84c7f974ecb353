"""Which media a run trains on, what is left out, and what is said about it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

from runner.core.errors import UserError
from runner.data.corrections.model import Display
from runner.data.select import (
    Selection,
    dataset_fingerprint,
    is_held_out,
    item_id,
    select,
    would_be_selected,
)
from runner.data.source_options import source_options

TINY = ["engine=diffusers", "model=tiny"]


def selection(items: list[Any], *overrides: str) -> Selection:
    return fake_facts(compose(*TINY, *overrides), items).selection


# i2v trains on clips; pictures beside them are left out by name, and so is the 1-frame target.
def test_i2v_takes_clips() -> None:
    chosen = selection([fake_item("a.jpg"), fake_item("b.mp4")], "task=i2v")
    (item,) = chosen.items
    assert item.media.name == "b.mp4"
    assert [crop.frames for crop in item.crops] == [13, 25]
    assert chosen.notices == (
        "task=i2v learns from clips: 1 picture left out: a.jpg.",
        "task=i2v leaves out the target of 1 frame: it would learn to copy its input.",
    )
    with pytest.raises(UserError, match="learn to copy"):
        selection([fake_item("b.mp4")], "task=i2v", "dataset.target_frames=[1]")


# A source of pictures beside one of clips gives i2v nothing and stops nothing; only without any
# clip is there nothing to learn from.
def test_i2v_leaves_a_source_of_pictures_out() -> None:
    config = compose(*TINY, "task=i2v", "dataset.sources=[{path: stills}, {path: moves}]")
    stills, moves = fake_facts(config, [fake_item("b.mp4")]).sources
    stills = replace(stills, media=(fake_item("a.jpg"),))
    chosen = select([stills, moves], task="i2v", validation_fraction=0)
    assert [(item.source, item.media.name) for item in chosen.items] == [(1, "b.mp4")]
    assert "task=i2v learns from clips: 1 picture left out: a.jpg." in chosen.notices
    with pytest.raises(UserError) as caught:
        select([stills, replace(moves, media=stills.media)], task="i2v", validation_fraction=0)
    assert str(caught.value) == (
        "task=i2v learns motion from clips, and stills, moves have only pictures (2): add clips, "
        "or take task=t2v."
    )


# Clips too short for every target are left out by name; with nothing left, that is the error.
def test_short_clips_are_named() -> None:
    short = fake_item("short.mp4", frames=9)
    chosen = selection([short, fake_item("a.jpg")], "dataset.target_frames=[13,25]")
    assert [item.media.name for item in chosen.items] == ["a.jpg"]
    assert "short.mp4 (9 frames)" in chosen.notices[0]
    with pytest.raises(UserError, match=r"short\.mp4"):
        selection([short], "dataset.target_frames=[13,25]")


# Targets that musubi-tuner silently loses to a low source_fps are named.
def test_targets_lost_to_a_low_frame_rate_are_named() -> None:
    chosen = selection([fake_item("a.mp4")], "dataset.source_fps=12")
    assert [crop.frames for crop in chosen.items[0].crops] == [1, 13]
    assert "cuts no crops of 25 frames" in chosen.notices[0]
    assert selection([fake_item("a.mp4")]).notices == ()


# What is unpacked of an archive is what the run will train on: so too where source_fps drops so
# many frames of a clip that none of the targets fits, or the clip's own rate does.
@pytest.mark.parametrize("mode", ["head", "uniform"])
def test_what_is_used_is_what_is_selected(mode: str) -> None:
    clip, picture = fake_item("a.mp4", frames=49, fps=48.0), fake_item("b.jpg")
    options = ("dataset.target_frames=[49]", f"dataset.frame_extraction={mode}")
    for rate, used in (
        ("source_fps=24", True),
        ("source_fps=48", False),
        ("fps=native", True),
        ("fps=48", True),
        ("fps=auto", False),
    ):
        given = (*options, f"dataset.{rate}")
        config = compose(*TINY, *given)
        (source,) = source_options(config.dataset)
        assert would_be_selected(clip, source, config.task.name) is used
        names = {item.media.name for item in selection([clip, picture], *given).items}
        assert ("a.mp4" in names) is used


# Media without captions stop the run, or are skipped, or get the default, as was said.
def test_missing_captions() -> None:
    items = [fake_item("a.jpg"), fake_item("b.jpg", caption=None), fake_item("c.jpg", caption="")]
    with pytest.raises(UserError, match=r"2 of 3 media in data have no caption: b\.jpg, c\.jpg"):
        selection(items)
    skipped = selection(items, "dataset.missing_captions=skip")
    assert [item.media.name for item in skipped.items] == ["a.jpg"]
    named = selection(items, "dataset.default_caption=a thing", "dataset.trigger_word=ohwx")
    assert sorted(item.caption for item in named.items) == [
        "ohwx, a caption of a",
        "ohwx, a thing",
        "ohwx, a thing",
    ]


# A correction changes what is trained on, and so the dataset's fingerprint; a mode alone does not.
def test_corrections_are_in_the_fingerprint() -> None:
    plain = fake_item("a.png", mode="RGBA")
    turned = replace(plain, display=Display(orientation=6), size=plain.size)
    prints = {
        dataset_fingerprint(selection([item]).items)
        for item in (plain, replace(plain, mode="RGB"), turned)
    }
    assert len(prints) == 2


# The split goes by content: an item stays on its side whatever else is in the dataset, and a
# larger fraction only adds to what is held out.
def test_the_split_is_by_content() -> None:
    items = [fake_item(f"{n}.jpg") for n in range(400)]

    def held_out(fraction: float, of: list[Any] = items) -> set[str]:
        chosen = selection(of, f"dataset.validation_fraction={fraction}")
        return {item.media.name for item in chosen.items if item.held_out}

    small, large = held_out(0.1), held_out(0.3)
    assert 20 <= len(small) <= 60
    assert small < large
    assert held_out(0.1, items[:100]) == {name for name in small if int(name[:-4]) < 100}
    none = selection(items[:1], "dataset.validation_fraction=0.001")
    assert none.notices == (
        "dataset.validation_fraction=0.001 holds out none of the 1 items (this can happen with "
        "few items): raise it.",
    )
    assert not is_held_out("f" * 64, 0.999)
    assert not is_held_out("0" * 64, 0.0)


# Item names are safe in a glob, different for different items, and the same on every machine.
def test_item_ids() -> None:
    item = fake_item("[weird] näme (1)*?.jpg")
    name = item_id(0, item, "caption")
    assert name.startswith("weird-na")
    assert all(c.isascii() and (c.isalnum() or c == "-") for c in name)
    others = {
        item_id(1, item, "caption"),
        item_id(0, item, "other"),
        item_id(0, fake_item("x/[weird] näme (1)*?.jpg"), "caption"),
    }
    assert name not in others
    assert len(others) == 3


# A row that is given three times is three items and three samples, encoded once; the first has the
# id that it has alone.
@pytest.mark.parametrize("name", ["a.jpg", "b.mp4"])
def test_a_repeated_row_is_an_item_each_time(name: str) -> None:
    config = compose(*TINY, "optimizer=adamw")
    once, thrice = (
        fake_facts(config, [fake_item("c.jpg"), *[fake_item(name)] * times]) for times in (1, 3)
    )
    ids = [item.id for item in thrice.selection.items]
    assert len(ids) == len(set(ids)) == 4
    assert {item.id for item in once.selection.items} < set(ids)
    plan, alone = plan_of(config, thrice), plan_of(config, once)
    for stage in ("latents", "text"):
        made, links = plan.stage(stage).entries, [e.links for e in plan.stage(stage).entries]
        assert {e.full_key for e in made} == {e.full_key for e in alone.stage(stage).entries}
        assert len({place for places in links for place in places}) == sum(map(len, links))
        assert sum(map(len, links)) == len(made) + 2 * (len(made) - 1)
    assert plan.steps_per_epoch == alone.steps_per_epoch + 2 * (alone.steps_per_epoch - 1)


# The fingerprint is of what is trained on: not of names or order, but of media, captions, sizes,
# crops and the split.
def test_fingerprint() -> None:
    items = [fake_item("a.jpg"), fake_item("b.mp4")]
    chosen = selection(items).items
    base = dataset_fingerprint(chosen)
    renamed = [replace(item, name="moved/" + item.name) for item in items]
    assert dataset_fingerprint(selection(renamed).items) == base
    assert dataset_fingerprint(reversed(chosen)) == base
    clip = next(item for item in chosen if item.media_kind == "video")
    (other,) = (item for item in chosen if item is not clip)
    changed = [
        replace(clip, media=replace(clip.media, sha256="0" * 64)),
        replace(clip, caption="new"),
        replace(clip, bucket=(clip.bucket[1], clip.bucket[0])),
        replace(clip, crops=clip.crops[:-1]),
        replace(clip, crops=(*clip.crops[:-1], replace(clip.crops[-1], position=1))),
        replace(clip, crops=(*clip.crops[:-1], replace(clip.crops[-1], frames=29))),
        replace(clip, held_out=True),
    ]
    fingerprints = {dataset_fingerprint([other, item]) for item in changed}
    assert len(fingerprints | {base}) == 1 + len(changed)


# The options themselves change it where they change what is trained on.
@pytest.mark.parametrize(
    "override",
    [
        "dataset.resolution=[320,192]",
        "dataset.target_frames=[13]",
        "dataset.validation_fraction=0.5",
        "dataset.trigger_word=ohwx",
    ],
)
def test_options_that_change_the_fingerprint(override: str) -> None:
    items = [fake_item("a.jpg", sha256="0" * 64), fake_item("b.mp4", sha256="f" * 64)]
    base = dataset_fingerprint(selection(items).items)
    assert dataset_fingerprint(selection(items, override).items) != base


# The two bucket flags are for pictures: musubi-tuner caches clips as if neither were set, and would
# not find those of another size again.
@pytest.mark.parametrize("flag", ["enable_bucket=false", "bucket_no_upscale=true"])
def test_bucket_flags_leave_clips_as_they_are(flag: str) -> None:
    items = [fake_item(name, size=(320, 128)) for name in ("a.jpg", "b.mp4")]
    plain, flagged = (
        {item.media_kind: item.bucket for item in selection(items, *overrides).items}
        for overrides in ((), (f"dataset.{flag}",))
    )
    assert plain["image"] == plain["video"] == flagged["video"]
    assert flagged["image"] != plain["image"]


# Pictures that musubi-tuner would crash on are handed on as RGB copies.
def test_transparent_pictures_become_rgb() -> None:
    (item,) = selection([fake_item("a.png", mode="RGBA")]).items
    assert item.correction.only_rgb
    assert item.media_name.endswith(".png")


# The size that the LoRA's metadata gives is the bucket of most samples, be they pictures or crops
# of clips, repeats included and held-out items left out; of two equal counts it is the larger one.
def test_the_trained_size_of_a_mixed_dataset() -> None:
    def trained(tall: int, *overrides: str, repeats: int = 1) -> str:
        items = [fake_item(f"{n}.png", size=(600, 800), repeats=repeats) for n in range(tall)]
        config = compose(*overrides)
        plan = plan_of(config, fake_facts(config, [fake_item("clip.mp4"), *items]))
        return str(tomllib.loads(dict(plan.files)["train.toml"])["metadata_reso"])

    # The clip has a crop for each of its three targets; 960x544 has more pixels than 624x832.
    wide, upright = "960,544", "624,832"
    assert [trained(tall) for tall in (0, 2, 3, 4)] == [wide, wide, wide, upright]
    assert trained(2, "dataset.target_frames=[1]") == upright
    assert trained(2, repeats=2) == upright
    assert trained(4, "dataset.validation_fraction=0.5") == wide
    small = "dataset.sources=[{path: a}, {path: b, resolution: [480, 272], num_repeats: 2}]"
    assert trained(0, small) == "480,272"
    assert trained(0, small.replace("2}", "1}")) == wide
