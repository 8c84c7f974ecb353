"""Options of the command line that do nothing are refused before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import TOP
from in_process import composed
from rich.console import Console as RichConsole
from test_shared_notices import ENGINES, NOTICES
from whole_run import small_run

from runner.core.console import Console
from runner.core.errors import UserError
from runner.engines.registry import engine_named
from runner.pipeline.executor import check, prepare


def refused(*overrides: str) -> str | None:
    """What is said of a command line before anything is read, or None."""
    one = composed(*overrides)
    try:
        check(one, engine_named(one.config.engine.name))
    except UserError as error:
        return str(error)
    return None


# The line of the notice is that of the error; the number of steps and the data are known later.
LATER = ("never reached", "does nothing for clips", "learning_rate")
REFUSED = [
    (tuple(case["overrides"]), case["line"])
    for case in NOTICES["reported"]
    if not any(word in case["line"] for word in LATER)
]


# An option that a person has set and that does nothing is an error, for both engines.
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=str)
def test_what_does_nothing_is_refused(
    engine: tuple[str, ...], overrides: tuple[str, ...], line: str
) -> None:
    assert refused(*engine, *overrides) == line


# The same options pass where they have an effect.
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("overrides", NOTICES["quiet"], ids=" ".join)
def test_what_acts_is_accepted(engine: tuple[str, ...], overrides: list[str]) -> None:
    assert refused(*engine, *overrides) is None


# With musubi-tuner a limit chooses the tier, so that a tier by name leaves it nothing to do.
def test_a_limit_beside_a_tier() -> None:
    limit = ("memory.limit_gb=12", "engine=musubi")
    line = refused(*limit, "memory=24gb")
    assert line == (
        "memory.limit_gb=12 does nothing with memory=24gb and engine=musubi: take memory=auto, "
        "which chooses a tier by it."
    )
    assert refused(*limit) is None
    assert refused("memory.limit_gb=12", "engine=diffusers", "memory=24gb") is None


# One of two options that read it is enough; musubi-tuner alone has both.
def test_one_reader_is_enough() -> None:
    sampling = ("training.timestep_sampling=sigma", "training.weighting_scheme=logit_normal")
    assert refused(*sampling, "training.logit_mean=1") is None


ADAFACTOR = ("optimizer=custom", "optimizer.type=adafactor")
MORE = {
    (
        "sampling.width=320",
    ): "sampling.width does nothing with sampling=none: add sampling=prompts.",
    (*ADAFACTOR, "optimizer.learning_rate=1e-3"): (
        "optimizer.learning_rate=0.001 does nothing: Adafactor sets its own rate, unless "
        "optimizer.args.relative_step=false and optimizer.args.warmup_init=false."
    ),
    ("memory=24gb", "memory.blocks_to_swap=0", "memory.h2d_only=true"): (
        "memory.h2d_only=true does nothing without block swap: leave it out, or set "
        "memory.blocks_to_swap above 0."
    ),
    ("training.timestep_sampling=sigma", "training.num_timestep_buckets=4"): (
        "training.num_timestep_buckets=4 does nothing with training.timestep_sampling=sigma: take "
        "training.timestep_sampling=shift or sigmoid or uniform or logsnr."
    ),
    ("engine=diffusers", "model=tiny", "training.data_workers=4"): (
        "training.data_workers=4 does nothing with engine=diffusers, which reads ahead in one "
        "thread: leave it out."
    ),
}


# So is what one engine alone ignores, and what only previews need.
@pytest.mark.parametrize("overrides", MORE, ids=" ".join)
def test_what_does_nothing_elsewhere_is_refused(overrides: tuple[str, ...]) -> None:
    assert refused(*overrides) == MORE[overrides]


# A recipe's or a tier's value does not forbid to change what it is for.
@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=rehearsal",),
        ("experiment=motion", "dataset.frame_extraction=head"),
        ("experiment=motion", "training.timestep_sampling=sigmoid"),
        ("experiment=character", "network=loha"),
        ("engine=diffusers", "model=tiny", "memory=16gb", "memory.blocks_to_swap=0"),
        ADAFACTOR,
    ],
    ids=" ".join,
)
def test_a_recipe_is_not_refused(overrides: tuple[str, ...]) -> None:
    assert refused(*overrides) is None


# Whether the buckets' options act is known with the data: for clips alone they don't, and a picture
# among them obeys.
def test_buckets_of_clips_alone_are_refused(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    samples = TOP / "runner" / "data" / "sample"
    clip = next((samples / "clips").glob("*.mp4"))
    for file in (clip, clip.with_suffix(".txt")):
        shutil.copy(file, media)
    overrides = composed(
        *small_run(tmp_path / "outputs", media), "dataset.enable_bucket=false", "dry_run=true"
    )
    with pytest.raises(UserError, match=r"dataset\.enable_bucket=false does nothing for clips"):
        prepare(overrides, Console(RichConsole()), tmp_path)
    picture = next((samples / "photos").glob("*.jpg"))
    for file in (picture, picture.with_suffix(".txt")):
        shutil.copy(file, media)
    assert prepare(overrides, Console(RichConsole()), tmp_path).plan.steps
