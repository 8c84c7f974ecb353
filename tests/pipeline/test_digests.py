"""The two digests of a run, over every option: what gave the result, and what was asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

from runner.config import schema
from runner.config.dataset_schema import SourceConfig
from runner.config.option import Option, option, part
from runner.config.rules import value_of
from runner.config.schema import RunConfig, options
from runner.engines.base import Gpu
from runner.engines.registry import engine_named
from runner.pipeline.digests import FIRST_DEFAULTS, fingerprint, resume_key

TINY = ("engine=diffusers", "model=tiny", "optimizer=adamw", "memory=cpu")
MEDIA = [fake_item("a.jpg"), fake_item("b.mp4"), fake_item("c.png")]
OPTIONS = {one.key: one for one in options()}


# The dataset's options that are asked for, but for the kind and the revision, which are known by
# other ways to write it, and for the sources, which have all of them; and values that must be so.
DATASET = [
    one.key.removeprefix("dataset.")
    for one in OPTIONS.values()
    if one.key.startswith("dataset.")
    and one.digests == "resume_key"
    and one.key not in ("dataset.kind", "dataset.revision", "dataset.sources")
]
VALUES = {
    "resolution": [512, 512],
    "target_frames": [1, 25],
    "validation_fraction": 0.5,
    "fps": "native",
    "background": "black",
}


def digests(config: RunConfig, **changes: Any) -> tuple[str | None, str]:
    """The fingerprint and the resume key of a run with this config, on the same media."""
    facts = replace(fake_facts(config, changes.pop("media", MEDIA)), **changes)
    engine = engine_named(config.engine.name)
    return fingerprint(facts, plan_of(facts.config, facts), engine), resume_key(facts, engine)


def changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    """A copy of the config with one option set."""
    config = copy.deepcopy(config)
    *groups, name = key.split(".")
    owner: Any = value_of(config, ".".join(groups)) if groups else config
    setattr(owner, name, value)
    return config


def other(one: Option, value: Any) -> Any:
    """Another value of the option's type."""
    if one.key == "training.compile":
        # Whether blocks are compiled is in the result, which is tested below; here they are not.
        return "none"
    if one.choices:
        return next(choice for choice in one.choices if choice != value)
    if "dict" in one.type:
        return {"one": 1}
    if "list" in one.type:
        return [*(value or []), 5 if "int" in one.type else "other"]
    if "bool" in one.type:
        return not value
    if "int" in one.type or "float" in one.type:
        return (value or 1) * 2
    return f"{value}-other"


# Every option is decided on, by its definition or its group's: the golden file has each by name, so
# that a new one is looked at, and one that is gone.
def test_every_option_is_decided_on(golden: Callable[[str, str], None]) -> None:
    assert None not in {one.digests for one in OPTIONS.values()}
    golden("digests/counts.txt", "".join(f"{key} {one.digests}\n" for key, one in OPTIONS.items()))


# An option is in just those digests that its definition says. Options that a source may have of its
# own are below; what is not set differently changes nothing.
@pytest.mark.parametrize("key", [key for key in OPTIONS if not key.startswith("dataset.")])
def test_each_option_counts_as_it_says(key: str) -> None:
    config = compose(*TINY)
    facts = fake_facts(config, MEDIA)
    engine = engine_named("diffusers")
    plan = plan_of(config, facts)
    again = changed(config, key, other(OPTIONS[key], value_of(config, key)))
    # The plan is the same: how it changes is tested below.
    after = replace(facts, config=again)
    if key in ("engine.path", "engine.python"):
        after = replace(after, engine=replace(facts.engine, python="/else", source_path="/else"))
    result = fingerprint(after, plan, engine) != fingerprint(facts, plan, engine)
    asked = resume_key(after, engine) != resume_key(facts, engine)
    wanted = {"both": (True, True), "resume_key": (False, True)}.get(
        str(OPTIONS[key].digests), (False, False)
    )
    assert (result, asked) == wanted


# Each option of the dataset that decides what is trained on changes the resume key, for all sources
# and for one of several.
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("key", DATASET)
def test_options_of_the_dataset_are_asked_for(key: str, several: bool) -> None:
    config = compose(*TINY)
    one = OPTIONS[f"dataset.{key}"]
    value = VALUES.get(key, other(one, value_of(config, one.key)))
    whole = key in ("missing_captions", "validation_fraction", "background")
    if several:
        sources = [SourceConfig(path="/one"), SourceConfig(path="/two")]
        config = changed(config, "dataset.sources", sources)
    again = copy.deepcopy(config)
    setattr(again.dataset if whole or not several else again.dataset.sources[1], key, value)
    assert digests(config)[1] != digests(again)[1]


# What the media are counts in the fingerprint, and where they lie does not; the resume key is of
# what they are called. A part of the dataset held out is one that gave nothing.
def test_media_count_by_content() -> None:
    config = compose(*TINY)
    result, asked = digests(config)
    assert digests(changed(config, "dataset.path", "/moved"))[0] == result
    for media in (MEDIA[:2], [replace(MEDIA[0], sha256="0" * 64), *MEDIA[1:]]):
        assert digests(config, media=media)[0] != result
        assert digests(config, media=media)[1] == asked
    for key, value in (("validation_fraction", 0.4), ("resolution", [512, 512])):
        assert digests(changed(config, f"dataset.{key}", value))[0] != result
    assert digests(changed(config, "dataset.trigger_word", "ohwx"))[0] != result


# A drawn seed is what gave the result, and the wish for one is what was asked for.
def test_a_drawn_seed() -> None:
    drawn = compose(*TINY, "training.seed=-1")
    one, other_one = (digests(drawn, seed=seed) for seed in (7, 8))
    assert one[0] != other_one[0]
    assert one[1] == other_one[1] != digests(compose(*TINY, "training.seed=7"))[1]
    assert one[0] == digests(compose(*TINY, "training.seed=7"))[0]


# Weights count by content, once they are there: a branch that was moved on gives another result.
def test_weights_count_by_content() -> None:
    config = compose(*TINY)
    facts = fake_facts(config, MEDIA)
    engine = engine_named("diffusers")

    def result(digests: dict[str, str] | None) -> str | None:
        there = replace(facts, weights=replace(facts.weights, digests=digests))
        return fingerprint(there, plan_of(config, there), engine)

    known = facts.weights.digests
    assert result(None) is None
    assert len({result(known), *(result({**known, part: "moved on"}) for part in known)}) > 4
    revised = changed(config, "model.revision", "v2")
    assert digests(revised)[0] == result(known)
    assert digests(revised)[1] != digests(config)[1]


# The memory plan of another GPU changes the result where it changes what is encoded, and never the
# key. So does a graph that was compiled.
def test_the_plan_for_a_gpu() -> None:
    small, large = (
        compose("memory=12gb", "precision=fp8", "training.compile=none"),
        compose("memory=80gb", "precision=fp8", "training.compile=none"),
    )
    assert digests(small)[1] == digests(large)[1]
    assert digests(small)[0] != digests(large)[0]
    same = compose("memory=80gb", "precision=fp8", "memory.blocks_to_swap=20")
    same = changed(same, "training.compile", "none")
    assert digests(same) == digests(large)
    compiled = changed(large, "training.compile", "auto")
    gpu = Gpu("NVIDIA H100", 80.0, (9, 0))
    assert digests(compiled, gpu=gpu)[0] != digests(large)[0]
    assert digests(compiled)[0] == digests(large)[0]


# One config written in two ways has the same digests: a group's choice or the options that it sets,
# a value that is the default, one path or a list of one source, the same frames in another order.
@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["optimizer=adafactor"], ["optimizer=custom", "optimizer.type=adafactor", "A"]),
        (["precision=fp16"], ["precision.mixed_precision=fp16", "precision.dit_dtype=float16"]),
        (["dataset.path=/a"], ["dataset.sources=[{path: /a}]"]),
        (["dataset.path=/a.zip"], ["dataset=zip", "dataset.path=/a.zip"]),
        (["dataset.batch_size=2"], ["dataset.sources=[{path: data, batch_size: 2}]"]),
        (["dataset.target_frames=[1,13,25]"], ["dataset.target_frames=[25,13,1,1]"]),
        ([], ["network.alpha=32", "training.epochs=10", "optimizer.learning_rate=0.0001"]),
    ],
)
def test_two_ways_to_write_it(one: list[str], two: list[str]) -> None:
    relative = "optimizer.args={relative_step: false, scale_parameter: false, warmup_init: false}"
    two = [relative if word == "A" else word for word in two]
    first, second = compose(*TINY, *one), compose(*TINY, *two)
    assert digests(first) == digests(second)


@dataclass
class LaterTraining(schema.TrainingConfig):
    later: float = option(0.5, "An option of a later version.")


@dataclass
class LaterConfig(RunConfig):
    training: LaterTraining = part(LaterTraining)
    later: list[str] = option([], "Another.")
    settings: dict[str, Any] = field(default_factory=dict)


# An option of a later version changes no digest while it is at its default, and both once it is
# set, until its definition says otherwise: runs of earlier versions are still found and compared.
def test_a_new_option_at_its_default_changes_nothing() -> None:
    config = compose(*TINY)
    values = {name: getattr(config, name) for name in vars(config) if name != "training"}
    later = LaterConfig(**values, training=LaterTraining(**vars(config.training)))
    before = digests(config)
    assert digests(later) == before
    for key, value in (("later", ["x"]), ("training.later", 0.6), ("settings", {"a": 1})):
        now = digests(changed(later, key, value))
        assert now[0] != before[0] and now[1] != before[1]


# A default that changed since is distinguished from the first one, which is what earlier runs left
# out.
def test_a_default_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(*TINY)
    earlier = digests(config)
    first = {"training.epochs": 5, "dataset.batch_size": 4}
    monkeypatch.setattr("runner.pipeline.digests.FIRST_DEFAULTS", first)
    assert all(now != before for now, before in zip(digests(config), earlier, strict=True))
    as_before = changed(changed(config, "training.epochs", 5), "dataset.batch_size", 4)
    assert digests(as_before)[1] == earlier[1]


# musubi-tuner trains i2v scaled by default since 0.2.0, and that is another result; without scaling
# it is what it was, and t2v, which has no condition, has the digests it had.
def test_the_condition_of_i2v() -> None:
    unscaled = "training.i2v_unscaled_condition=true"
    words = ("task=i2v", "precision=fp8", "network.rank=16", "dataset.path=/data/mine.zip")
    recorded = digests(compose(*words, unscaled))
    # As recorded by 0.1.0 and until this changed.
    assert recorded == ("fc2128e7d162ad75", "e46b31c42a353590")
    scaled = digests(compose(*words))
    assert scaled[0] != recorded[0] and scaled[1] != recorded[1]
    assert digests(compose()) == digests(compose(unscaled))


# Digests leave defaults out, so that a default that changes makes runs equal that are not. Whoever
# changes one enters the old one in FIRST_DEFAULTS; lines come to this file for new options alone.
def test_first_defaults(golden: Callable[[str, str], None]) -> None:
    counted = [one for one in options() if one.digests in ("both", "resume_key")]
    lines = [f"{one.key} = {FIRST_DEFAULTS.get(one.key, one.default)!r}\n" for one in counted]
    golden("digests/defaults.txt", "".join(sorted(lines)))


# The digests of some runs as they were recorded: a change to these makes unfinished runs of earlier
# versions unfindable, and equal ones different.
def test_recorded_digests(golden: Callable[[str, str], None]) -> None:
    runs = (
        TINY,
        (),
        ("task=i2v", "precision=fp8", "network.rank=16", "dataset.path=/data/mine.zip"),
        ("training.seed=-1", "optimizer=adafactor", "dataset.resolution=[512,512]"),
    )
    lines = []
    for words in runs:
        result, asked = digests(compose(*words))
        lines.append(f"{result} {asked} {' '.join(words)}\n")
    golden("digests/recorded.txt", "".join(lines))
