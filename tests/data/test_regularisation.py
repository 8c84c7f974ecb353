"""Regularisation sets: how often they are seen, which of their items, with which captions."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import compose, fake_item, problems_of

from runner.core.errors import UserError
from runner.data.balance import weigh
from runner.data.select import Selection, Source, select
from runner.data.source_options import source_options

TINY = ["engine=diffusers", "model=tiny", "optimizer=adamw"]


def weighed(
    weight: str, regular: list[Any], others: list[Any], *overrides: str
) -> tuple[tuple[Source, ...], Selection]:
    config = compose(
        *TINY,
        "dataset.sources=[{path: own, num_repeats: 2},"
        f"{{path: reg, regularisation: true, weight: {weight}}}]",
        *overrides,
    )
    options = source_options(config.dataset)
    sources = tuple(
        Source(option, "folder", option.path, tuple(items), ())
        for option, items in zip(options, (others, regular), strict=True)
    )
    fraction = config.dataset.validation_fraction
    return weigh(sources, select(sources, task="t2v", validation_fraction=fraction))


def pictures(prefix: str, number: int) -> list[Any]:
    return [fake_item(f"{prefix}{n}.jpg") for n in range(number)]


# Samples of the set come as near to weight times those of the others as whole repeats allow: a
# small set is repeated, a large one gives a part. 40 others x2 are 80 samples.
@pytest.mark.parametrize(
    ("weight", "size", "taken", "repeats"),
    [
        ("1", 80, 80, 1),
        ("1", 79, 79, 1),
        ("1", 100, 80, 1),
        ("0.5", 100, 40, 1),
        ("0.5", 10, 10, 4),
        ("1", 33, 33, 2),  # 66 is nearer to 80 than 99
        ("1.2", 33, 33, 3),  # 99 is nearer to 96 than 66
        ("0.001", 100, 1, 1),
    ],
)
def test_weight_decides_how_often_a_set_is_seen(
    weight: str, size: int, taken: int, repeats: int
) -> None:
    sources, chosen = weighed(weight, pictures("r", size), pictures("o", 40))
    assert len(chosen.of(1, "image", held_out=False)) == taken
    assert sources[1].options.num_repeats == repeats
    assert (len(chosen.of(0, "image", held_out=False)), sources[0].options.num_repeats) == (40, 2)
    assert chosen.notices == (
        f"regularisation: reg, {taken} of {size} items x{repeats} = {taken * repeats} "
        f"sample{'s' if taken * repeats > 1 else ''} beside 80.",
    )


# Each crop of a clip is a sample, on both sides.
def test_crops_count() -> None:
    clips = [fake_item(f"c{n}.mp4") for n in range(30)]  # three crops each
    sources, chosen = weighed("0.5", clips, pictures("o", 60))
    assert sources[1].options.num_repeats == 1
    assert len(chosen.of(1, "video", held_out=False)) == 20


# The part is chosen by content: in any order the same, and a larger weight only adds to it.
def test_the_part_is_chosen_by_content() -> None:
    regular, others = pictures("r", 100), pictures("o", 40)

    def names(weight: str, items: list[Any]) -> set[str]:
        chosen = weighed(weight, items, others)[1]
        return {item.media.name for item in chosen.of(1, "image", held_out=False)}

    small, large = names("0.3", regular), names("0.6", regular)
    assert names("0.3", regular[::-1]) == small
    assert small < large


# The subject's trigger word is not put before what is not the subject, unless the set has its own;
# and nothing of a set is held out, so that all of it is there to be trained on.
def test_no_trigger_word_and_nothing_held_out() -> None:
    sources, chosen = weighed(
        "3",
        pictures("r", 40),
        pictures("o", 40),
        "dataset.trigger_word=ohwx",
        "dataset.validation_fraction=0.5",
    )
    regular = [item for item in chosen.items if item.source == 1]
    others = [item for item in chosen.items if item.source == 0]
    assert {item.media.name for item in regular} == {f"r{n}.jpg" for n in range(40)}
    assert not any(item.held_out for item in regular)
    assert all(item.caption == f"a caption of {item.media.name[:-4]}" for item in regular)
    assert {item.media.name for item in others} == {f"o{n}.jpg" for n in range(40)}
    assert all(item.caption.startswith("ohwx, ") for item in others)
    trained = sum(not item.held_out for item in others)
    assert 0 < trained < 40
    # Three times as many samples as those of the others that are trained on, at x2.
    assert sources[1].options.num_repeats == round(3 * 2 * trained / 40)
    config = compose("dataset.sources=[{path: r, regularisation: true, trigger_word: dog}]")
    assert source_options(config.dataset)[0].trigger_word == "dog"


# Steps, dataset.toml and what is encoded follow the repeats and items that were chosen.
def test_the_plan_follows() -> None:
    import tomllib

    from conftest import fake_facts, plan_of

    config = compose(
        *TINY,
        "dataset.sources=[{path: own}, {path: reg, regularisation: true, weight: 3}]",
    )
    plan = plan_of(config, fake_facts(config, pictures("p", 4)))
    assert plan.steps_per_epoch == 4 + 3 * 4
    tables = tomllib.loads(dict(plan.files)["dataset.toml"])["datasets"]
    assert [table["num_repeats"] for table in tables] == [1, 3]
    assert "regularisation: reg, 4 of 4 items x3 = 12 samples beside 4." in plan.notices


# What makes no sense is reported in one line.
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a, weight: 0.5}]", "add regularisation: true"),
        ("[{path: a}, {path: r, regularisation: true, weight: 0}]", "weight=0.0 must be"),
        ("[{path: a}, {path: r, regularisation: true, num_repeats: 2}]", "drop num_repeats"),
        ("[{path: r, regularisation: true}]", "regularisation sets only"),
    ],
)
def test_wrong_weights_are_refused(sources: str, message: str) -> None:
    (problem,) = problems_of(compose(*TINY, f"dataset.sources={sources}"))
    assert message in problem and "\n" not in problem


# With every other item left out there is nothing to be regularised.
def test_regularisation_alone_is_refused() -> None:
    with pytest.raises(UserError, match="Only regularisation sets"):
        weighed(
            "1", pictures("r", 4), [fake_item("short.mp4", frames=1)], "dataset.target_frames=[13]"
        )


# Media that another source holds out are not trained on by way of a regularisation set, and when
# nothing else is left to train on, the line says why.
def test_what_is_held_out_stays_out() -> None:
    own = pictures("o", 40)
    half = "dataset.validation_fraction=0.5"
    _, chosen = weighed("1", own, own, half)
    held_out = {item.media.name for item in chosen.items if item.held_out}
    trained = {item.media.name for item in chosen.items if not item.held_out}
    assert 5 < len(held_out) < 35
    assert not held_out & trained
    out = [item for item in own if item.name in held_out]
    with pytest.raises(UserError, match=r"holds out all \d+ items: lower it"):
        weighed("1", pictures("r", 5), out, half)
