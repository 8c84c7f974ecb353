"""Rules on optimizers and learning-rate schedules that the engines share; pure.

Both trainers read the optimizer's name and the schedule's options from train.toml in the same way,
and use the schedules of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from runner.config.schema import RunConfig
from runner.core.text import did_you_mean
from runner.engines.base import IdleOption
from runner.engines.optimizer_classes import (
    ARGUMENTS,
    SHORT_NAMES,
    TORCH_NAMES,
    class_name,
    class_path,
    finds_its_rate,
    ignores_learning_rate,
    is_schedule_free,
    usual_rates,
)
from runner.formats.train_options import WITH_CYCLES, WITH_MIN_LR

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "rex",
)
# The trainers call step() without a closure, and a LoRA's gradients are dense.
_UNUSABLE = {"lbfgs": "a closure", "sparseadam": "sparse gradients"}


def problems(config: RunConfig) -> Iterator[str]:
    """Yield one line for each broken rule on the optimizer and its schedule."""
    yield from _type(config)
    yield from _arguments(config)
    yield from _together(config)
    yield from _schedule(config)


def plan_problems(config: RunConfig, *, steps: int) -> Iterator[str]:
    """Yield one line for each broken rule that depends on the number of optimizer steps."""
    scheduler = config.scheduler
    warmup, decay = scheduler.warmup_steps, int(scheduler.decay_fraction * steps)
    if scheduler.name == "warmup_stable_decay" and warmup + decay > steps:
        yield (
            f"scheduler.warmup_steps={warmup} and the {decay} steps of "
            f"scheduler.decay_fraction={scheduler.decay_fraction:g} must not exceed the run's "
            f"{steps} steps."
        )
    if scheduler.name == "rex" and warmup > steps:
        yield f"scheduler.warmup_steps={warmup} must not exceed the run's {steps} steps (rex)."


def idle_options(config: RunConfig) -> Iterator[IdleOption]:
    """Yield the learning rate where the optimizer sets its own."""
    if ignores_learning_rate(config.optimizer):
        yield IdleOption(
            "optimizer.learning_rate",
            f"optimizer.learning_rate={config.optimizer.learning_rate:g} does nothing: Adafactor "
            "sets its own rate, unless optimizer.args.relative_step=false and "
            "optimizer.args.warmup_init=false.",
        )


def notices(config: RunConfig, *, steps: int) -> Iterator[str]:
    """Yield warnings about accepted but probably unintended settings."""
    warmup, optimizer = config.scheduler.warmup_steps, config.optimizer
    if warmup >= steps:
        yield (
            f"scheduler.warmup_steps={warmup} is not below the run's {steps} steps: the learning "
            "rate is never reached."
        )
    rate, rates = optimizer.learning_rate, usual_rates(optimizer)
    if rates and not ignores_learning_rate(optimizer) and not rates.low <= rate <= rates.high:
        size = "low" if rate < rates.low else "high"
        yield (
            f"optimizer.learning_rate={rate:g} is {size} for {class_name(optimizer.type)}: "
            f"{rates.usual:g} is usual, and {rates.low:g} to {rates.high:g} makes sense."
        )


def _type(config: RunConfig) -> Iterator[str]:
    name = config.optimizer.type
    needs = _UNUSABLE.get(class_name(name).lower())
    if not name:
        yield "optimizer.type is empty: name a class, for example torch.optim.RMSprop."
    elif needs:
        yield f"optimizer.type={name} needs {needs}, which the trainer does not give it."
    elif "." in name or name.lower().endswith("8bit") or name.lower() in SHORT_NAMES:
        return  # Each engine has its own short names of 8-bit optimizers.
    elif name not in TORCH_NAMES:
        hint = did_you_mean(name, [*SHORT_NAMES, *TORCH_NAMES])
        yield f"optimizer.type={name} is not in torch.optim: give its full path.{hint}"


def _arguments(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    known = ARGUMENTS.get(class_path(optimizer.type))
    for key, value in optimizer.args.items():
        if key in ("lr", "params"):
            yield f"optimizer.args.{key} is given already: set optimizer.learning_rate."
        elif not _finite(value):
            yield f"optimizer.args.{key}={value} must be finite."
        elif known is not None and key not in known:
            yield (
                f"optimizer.type={optimizer.type} has no argument {key}.{did_you_mean(key, known)}"
            )
        elif known is not None and not known[key].fits(value):
            yield f"optimizer.args.{key}={value} must be {known[key].description}."


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


def _together(config: RunConfig) -> Iterator[str]:
    """Find optimizers that do not work with the schedule or the learning rate."""
    optimizer, scheduler = config.optimizer, config.scheduler
    scheduled = scheduler.name != "constant" or scheduler.warmup_steps > 0
    if scheduled and ignores_learning_rate(optimizer):
        yield (
            f"scheduler={scheduler.name} does nothing with Adafactor's relative_step, which sets "
            "its own rate: take scheduler=constant, or optimizer.args.relative_step=false and "
            "optimizer.args.warmup_init=false."
        )
    if scheduled and is_schedule_free(optimizer.type):
        yield (
            f"scheduler={scheduler.name} does nothing with a schedule-free optimizer: take "
            "scheduler=constant; it warms up by optimizer.args.warmup_steps."
        )
    if finds_its_rate(optimizer.type) and optimizer.learning_rate < 0.1:
        yield (
            f"optimizer.learning_rate={optimizer.learning_rate:g} is too small for "
            f"{class_name(optimizer.type)}, which finds the rate itself and multiplies it by "
            "this: take 1.0."
        )


def _schedule(config: RunConfig) -> Iterator[str]:
    scheduler = config.scheduler
    name, ratio = scheduler.name, scheduler.min_lr_ratio
    if name not in SCHEDULERS:
        yield f"scheduler.name={name} is not a choice.{did_you_mean(name, SCHEDULERS)}"
    if ratio is None and name == "cosine_with_min_lr":
        yield "scheduler=cosine_with_min_lr needs scheduler.min_lr_ratio, for example 0.1."
    if ratio is not None and not 0 <= ratio <= 1:
        yield f"scheduler.min_lr_ratio={ratio:g} must be between 0 and 1."
    elif ratio is not None and name not in WITH_MIN_LR:
        yield (
            f"scheduler.min_lr_ratio does nothing with scheduler={name}: take "
            "scheduler=cosine_with_min_lr, rex or warmup_stable_decay."
        )
    if scheduler.num_cycles != 1 and name not in WITH_CYCLES:
        yield (
            f"scheduler.num_cycles does nothing with scheduler={name}: take "
            "scheduler=cosine_with_restarts, cosine_with_min_lr or warmup_stable_decay."
        )
    if scheduler.power != 1 and name != "polynomial":
        yield f"scheduler.power does nothing with scheduler={name}: take scheduler=polynomial."
    if scheduler.decay_fraction and name != "warmup_stable_decay":
        yield (
            f"scheduler.decay_fraction does nothing with scheduler={name}: take "
            "scheduler=warmup_stable_decay."
        )
    if not scheduler.decay_fraction and name == "warmup_stable_decay":
        yield "scheduler=warmup_stable_decay needs scheduler.decay_fraction, for example 0.2."
    if scheduler.timescale is not None and name != "inverse_sqrt":
        yield (
            f"scheduler.timescale does nothing with scheduler={name}: take scheduler=inverse_sqrt."
        )
    if name == "polynomial" and config.optimizer.learning_rate <= 1e-7:
        yield (
            f"optimizer.learning_rate={config.optimizer.learning_rate:g} must be above 1e-07, "
            "where scheduler=polynomial ends."
        )
