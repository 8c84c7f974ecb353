"""Notices that the engines share: what does nothing, and learning rates that are unusual."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

from runner.engines.base import Gpu

ENGINES = {"musubi": (), "diffusers": ("engine=diffusers", "model=tiny")}
CARD = Gpu("large card", 80.0, (9, 0))
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
    told: tuple[str, ...] = plan_of(config, fake_facts(config, items, gpu=CARD)).notices
    return told


TOLD: dict[tuple[str, ...], str] = {
    ("scheduler=cosine", "scheduler.warmup_steps=30", "training.max_steps=30"): (
        "scheduler.warmup_steps=30 is not below the run's 30 steps: the learning rate is never "
        "reached."
    ),
    ("network=loha", "network.dropout=0.1"): (
        "network.dropout does nothing with network=loha; network.args.rank_dropout and "
        "network.args.module_dropout do."
    ),
    ("network=lokr", "network.dropout=0.1"): (
        "network.dropout does nothing with network=lokr; network.args.rank_dropout and "
        "network.args.module_dropout do."
    ),
    ("optimizer=custom", "optimizer.type=adafactor"): (
        "optimizer.learning_rate=0.0001 does nothing: Adafactor sets its own rate, unless "
        "optimizer.args.relative_step=false and optimizer.args.warmup_init=false."
    ),
    ("training.timestep_sampling=sigmoid", "training.discrete_flow_shift=7"): (
        "training.discrete_flow_shift=7 does nothing with training.timestep_sampling=sigmoid; it "
        "shifts with training.timestep_sampling=shift."
    ),
    ("training.timestep_sampling=uniform", "training.sigmoid_scale=2"): (
        "training.sigmoid_scale=2 does nothing with training.timestep_sampling=uniform."
    ),
    ("training.save_every_epochs=null", "training.keep_last=2"): (
        "training.keep_last does nothing without checkpoints: set training.save_every_epochs or "
        "training.save_every_steps."
    ),
    ("training.i2v_unscaled_condition=true",): (
        "training.i2v_unscaled_condition does nothing with task=t2v, which has no condition."
    ),
    ("sampling.prompts=[a cat]",): (
        "sampling.prompts does nothing with sampling=none: add sampling=prompts."
    ),
    (*PROMPTS, "sampling.prompts=[a cat]", "sampling.image_path=a.png"): (
        "sampling.image_path does nothing with task=t2v, whose previews begin from noise."
    ),
    ("dataset.frame_stride=2",): (
        "dataset.frame_stride does nothing without dataset.frame_extraction=slide."
    ),
    ("dataset.sources=[{path: a, frame_sample: 3}]",): (
        "dataset.frame_sample does nothing without dataset.frame_extraction=uniform."
    ),
    ("dataset.max_frames=65",): (
        "dataset.max_frames does nothing without dataset.frame_extraction=full."
    ),
    ("dataset.enable_bucket=false",): (
        "dataset.enable_bucket=false does nothing for clips, which are sorted into buckets and "
        "enlarged to them in any case."
    ),
    ("dataset.bucket_no_upscale=true",): (
        "dataset.bucket_no_upscale=true does nothing for clips, which are sorted into buckets and "
        "enlarged to them in any case."
    ),
}


# What would be left out without a word is a notice of the plan.
@pytest.mark.parametrize("overrides", TOLD, ids=" ".join)
def test_what_does_nothing_is_told(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    told = notices(*engine, *overrides, items=CLIPS)
    assert [line for line in told if "nothing" in line or "never" in line] == [TOLD[overrides]]


# The same options say nothing where they have an effect.
@pytest.mark.parametrize(
    "overrides",
    [
        ("scheduler=cosine", "scheduler.warmup_steps=30", "training.max_steps=31"),
        ("network=lora", "network.dropout=0.1"),
        ("optimizer=adafactor",),
        ("training.timestep_sampling=shift", "training.discrete_flow_shift=7"),
        ("training.timestep_sampling=sigmoid", "training.sigmoid_scale=2"),
        ("training.save_every_steps=5", "training.save_every_epochs=null", "training.keep_last=2"),
        ("dataset.frame_extraction=slide", "dataset.frame_stride=2"),
        (
            "dataset.frame_sample=3",
            "dataset.sources=[{path: a, frame_extraction: uniform}, {path: b}]",
        ),
    ],
    ids=" ".join,
)
def test_what_acts_is_not_told(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    assert not [told for told in notices(*engine, *overrides, items=CLIPS) if "nothing" in told]


# Pictures do obey the buckets' options.
def test_buckets_of_pictures_are_not_told(engine: tuple[str, ...]) -> None:
    told = notices(*engine, "dataset.enable_bucket=false", items=PICTURES)
    assert not [line for line in told if "enable_bucket" in line]


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


# A rate with which an optimizer learns nothing or breaks off is told, with the one that is usual.
@pytest.mark.parametrize("overrides", RATES, ids=" ".join)
def test_an_unusual_rate_is_told(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    told = notices(*engine, *overrides)
    assert [line for line in told if "learning_rate" in line] == [RATES[overrides]]


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
