"""Notices that the engines share: what does nothing, and learning rates that are unusual."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import TOP, compose, fake_facts, fake_item, plan_of

from runner.engines.base import Gpu

ENGINES = {"musubi": (), "diffusers": ("engine=diffusers", "model=tiny")}
GPU = Gpu("large GPU", 80.0, (9, 0))
PICTURES = [fake_item("a.jpg"), fake_item("b.jpg")]
CLIPS = [*PICTURES, fake_item("clip.mp4")]
PROMPTS = ("sampling=prompts",)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The overrides that choose an engine and a model that it trains."""
    chosen: tuple[str, ...] = ENGINES[request.param]
    return chosen


def notices(*overrides: str, items: list[Any] = PICTURES) -> tuple[str, ...]:
    """The notices of a plan on a GPU that holds everything."""
    config = compose(*overrides)
    lines: tuple[str, ...] = plan_of(config, fake_facts(config, items, gpu=GPU)).notices
    return lines


# What is said of options that do nothing, in full, and overrides with which the same ones act.
NOTICES = json.loads((TOP / "tests" / "fixtures" / "notices.json").read_text("utf-8"))
NOTICES_OF = {tuple(case["overrides"]): case["line"] for case in NOTICES["reported"]}


# What would be left out without a word is a notice of the plan.
@pytest.mark.parametrize("overrides", NOTICES_OF, ids=" ".join)
def test_what_does_nothing_is_reported(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    lines = notices(*engine, *overrides, items=CLIPS)
    assert [line for line in lines if "nothing" in line or "never" in line] == [
        NOTICES_OF[overrides]
    ]


# The same options say nothing where they have an effect.
@pytest.mark.parametrize("overrides", [tuple(case) for case in NOTICES["quiet"]], ids=" ".join)
def test_what_acts_is_not_told(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    assert not [lines for lines in notices(*engine, *overrides, items=CLIPS) if "nothing" in lines]


# Pictures do obey the buckets' options.
def test_buckets_of_pictures_are_not_told(engine: tuple[str, ...]) -> None:
    lines = notices(*engine, "dataset.enable_bucket=false", items=PICTURES)
    assert not [line for line in lines if "enable_bucket" in line]


RATES = {
    ("optimizer=adamw", "optimizer.learning_rate=0.5"): (
        "optimizer.learning_rate=0.5 is high for AdamW: 0.0001 is usual, and 1e-06 to 0.01 makes "
        "sense."
    ),
    ("optimizer=adamw8bit", "optimizer.learning_rate=1e-7"): (
        "optimizer.learning_rate=1e-07 is low for AdamW8bit: 0.0001 is usual, and 1e-06 to 0.01 "
        "makes sense."
    ),
    ("optimizer=prodigy", "optimizer.learning_rate=20"): (
        "optimizer.learning_rate=20 is high for Prodigy: 1 is usual, and 0.1 to 10 makes sense."
    ),
    ("optimizer=lion8bit", "optimizer.learning_rate=5e-3"): (
        "optimizer.learning_rate=0.005 is high for Lion8bit: 2e-05 is usual, and 2e-07 to 0.002 "
        "makes sense."
    ),
    ("optimizer=muon", "optimizer.learning_rate=1"): (
        "optimizer.learning_rate=1 is high for Muon: 0.001 is usual, and 1e-05 to 0.1 makes sense."
    ),
    ("optimizer=adafactor", "optimizer.learning_rate=1"): (
        "optimizer.learning_rate=1 is high for Adafactor: 0.0001 is usual, and 1e-06 to 0.01 makes "
        "sense."
    ),
    ("optimizer=schedulefree_adamw", "optimizer.learning_rate=1"): (
        "optimizer.learning_rate=1 is high for AdamWScheduleFree: 0.0001 is usual, and 1e-06 to "
        "0.01 makes sense."
    ),
    ("optimizer=custom", "optimizer.type=torch.optim.SGD", "optimizer.learning_rate=1e-5"): (
        "optimizer.learning_rate=1e-05 is low for SGD: 0.1 is usual, and 0.0001 to 10 makes sense."
    ),
}


# A rate with which an optimizer learns nothing or breaks off is reported, with the one that is
# usual.
@pytest.mark.parametrize("overrides", RATES, ids=" ".join)
def test_an_unusual_rate_is_reported(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    lines = notices(*engine, *overrides)
    assert [line for line in lines if "learning_rate" in line] == [RATES[overrides]]


# No word of the limits themselves, of Adafactor that multiplies the rate by what is small, or of an
# optimizer that nobody knows.
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adamw", "optimizer.learning_rate=1e-2"),
        ("optimizer=adamw", "optimizer.learning_rate=1e-6"),
        ("optimizer=prodigy", "optimizer.learning_rate=0.1"),
        (
            *("optimizer=adafactor", "optimizer.args.scale_parameter=true"),
            "optimizer.learning_rate=0.1",
        ),
        ("optimizer=custom", "optimizer.type=some.library.Sum", "optimizer.learning_rate=50"),
    ],
    ids=" ".join,
)
def test_a_usual_rate_is_not_told(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    assert not [line for line in notices(*engine, *overrides) if "learning_rate" in line]
