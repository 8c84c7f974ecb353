"""The stages of a run in their order, one module each; they do all the work that has effects."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.schema import RunConfig
from runner.core.text import did_you_mean
from runner.pipeline.stages.base import Stage
from runner.pipeline.stages.convert import CONVERT
from runner.pipeline.stages.dataset import DATASET
from runner.pipeline.stages.evaluate import EVALUATE
from runner.pipeline.stages.latents import LATENTS
from runner.pipeline.stages.text import TEXT
from runner.pipeline.stages.train import TRAIN
from runner.pipeline.stages.weights import WEIGHTS

STAGES: tuple[Stage, ...] = (WEIGHTS, DATASET, LATENTS, TEXT, TRAIN, CONVERT, EVALUATE)


def problems(config: RunConfig) -> Iterator[str]:
    """Yield one line for each unknown stage name and each stage that can't be skipped; pure."""
    names = [stage.name for stage in STAGES]
    for key, names_given in (("skip", config.stages.skip), ("force", config.stages.force)):
        for name in names_given:
            if name not in names:
                yield f"stages.{key}: there is no stage {name}.{did_you_mean(name, names)}"
    for stage in STAGES:
        others = (other for other in STAGES if other.name not in config.stages.skip)
        readers = [other.name for other in others if set(other.needs) & set(stage.makes)]
        yield from stage.problems(config, readers)


def skipped(config: RunConfig) -> frozenset[str]:
    """Return the stages to skip: those named, and those that need the output of a skipped stage."""
    names = set(config.stages.skip)
    for stage in STAGES:
        missing = {output for other in STAGES if other.name in names for output in other.makes}
        if missing.intersection(stage.needs):
            names.add(stage.name)
    return frozenset(names)


def trains(config: RunConfig) -> bool:
    """Return whether the trainer will run."""
    return TRAIN.name not in skipped(config)
