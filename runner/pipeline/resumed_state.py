"""Check that the state of ``training.resume_from`` fits the run, before any work.

What a state folder does not say, task and optimizer, is read from the config.yaml of the run that
it lies in; where it lies in none, a notice says that it is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.text import counted
from runner.engines.optimizer_classes import class_path, ignores_learning_rate, is_schedule_free
from runner.engines.rules import trained_modules
from runner.formats.lora import lora_name
from runner.formats.training_state import TrainingState, read_state
from runner.pipeline.run_metadata import read_file

# Arguments of the network that decide how the optimizer's state is divided.
_NETWORK_ARGS = ("loraplus_lr_ratio", "factor")
_UNSET = "unset"


def check_state(config: RunConfig) -> None:
    """Check the state that a run resumes from.

    Raises:
        UserError: it is of another network, task or optimizer, or can't be read.
    """
    if config.training.resume_from is None:
        return
    folder = Path(config.training.resume_from)
    try:
        state = read_state(folder)
    except UserError as error:
        raise UserError(f"training.resume_from: {error}") from None
    record = _record(folder)
    differences = [
        *_network(config, state, record),
        *_schedule(config, state),
        *_learning_rate(config, state, record),
        *_recorded(config, record),
    ]
    if not differences:
        return
    theirs, ours = (", ".join(one[side] for one in differences) for side in (0, 1))
    raise UserError(
        f"training.resume_from={folder} is the state of another training: it has {theirs}; this "
        f"run has {ours}. Give the run what the state has, or start from the LoRA alone "
        "(network.weights), which leaves task, optimizer and rate free."
    )


def state_notices(config: RunConfig) -> Iterator[str]:
    """Yield what there is to know about the state that a run resumes from."""
    if config.training.resume_from is None:
        return
    folder = Path(config.training.resume_from)
    if not _record(folder):
        yield (
            f"training.resume_from: {folder.name} lies in no run's folder, and does not itself say "
            "its task and optimizer: they are not checked, and must be this run's."
        )
    schedule, warmup = read_state(folder).schedule, config.scheduler.warmup_steps
    if schedule and schedule.steps is not None and 0 < warmup <= schedule.steps:
        yield (
            f"scheduler.warmup_steps={warmup} does nothing: {folder.name} is already "
            f"{schedule.steps} steps on."
        )


def _record(folder: Path) -> Mapping[str, Any]:
    """Return the config of the run whose checkpoints a state lies in; empty if it lies in none."""
    run = folder.parent.parent
    if folder.parent.name != "checkpoints" or not (run / "run.json").is_file():
        return {}
    return read_file(run / "config.yaml")


# Each function yields pairs: what the state has, and what the run has instead.
def _network(
    config: RunConfig, state: TrainingState, record: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    network, found = config.network, state.network
    if network.name != found.kind:
        yield f"network={found.kind}", f"network={network.name}"
    if network.rank != found.rank:
        yield f"network.rank={found.rank}", f"network.rank={network.rank}"
    # A LoKr with a full second factor has its rank for alpha, whatever the option is.
    alpha = found.alpha
    if found.kind == "lokr" and alpha == found.rank:
        alpha = record.get("network", {}).get("alpha", network.alpha)
    if not math.isclose(network.alpha, alpha, rel_tol=0.01):
        yield f"network.alpha={alpha:g}", f"network.alpha={network.alpha:g}"
    names = {lora_name(name) for name in trained_modules(config)}
    if names != state.modules:
        more = len(state.modules - names)
        yield (
            f"{counted(len(state.modules), 'module')} ({more} of them not this run's)",
            f"{counted(len(names), 'module')} (network.include, network.exclude)",
        )


def _schedule(config: RunConfig, state: TrainingState) -> Iterator[tuple[str, str]]:
    schedule, kind = state.schedule, config.optimizer.type
    if (schedule is None) != is_schedule_free(kind):
        has = "the state of a schedule" if schedule else "no state of a schedule (schedule-free)"
        yield has, f"optimizer.type={kind}"
    own_class = any(word.startswith("--lr_scheduler_type") for word in config.engine.extra_args)
    if schedule and not schedule.has_factors and not own_class:
        yield "the state of a schedule of its own kind (rex)", f"scheduler={config.scheduler.name}"


def _learning_rate(
    config: RunConfig, state: TrainingState, record: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Compare the rate: the trainer would go on with the state's, whatever the option is."""
    optimizer = config.optimizer
    rate = record.get("optimizer", {}).get("learning_rate")
    # With LoRA+ each half has its own.
    if state.schedule and len(state.schedule.learning_rates) == 1:
        rate = state.schedule.learning_rates[0]
    if rate is None or ignores_learning_rate(optimizer):
        return
    if not math.isclose(rate, optimizer.learning_rate, rel_tol=1e-6):
        yield (
            f"optimizer.learning_rate={rate:g}",
            f"optimizer.learning_rate={optimizer.learning_rate:g}",
        )


def _recorded(config: RunConfig, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not record:
        return
    task = record.get("task", {}).get("name")
    if task != config.task.name:
        yield f"task={task}", f"task={config.task.name}"
    theirs, ours = record.get("optimizer", {}), config.optimizer
    kind = str(theirs.get("type"))
    if class_path(kind) != class_path(ours.type):
        yield f"optimizer.type={kind}", f"optimizer.type={ours.type}"
    else:
        yield from _arguments("optimizer.args", theirs.get("args") or {}, ours.args)
    arguments = record.get("network", {}).get("args") or {}
    yield from _arguments(
        "network.args",
        {key: value for key, value in arguments.items() if key in _NETWORK_ARGS},
        {key: value for key, value in config.network.args.items() if key in _NETWORK_ARGS},
    )


def _arguments(
    option: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    for key in dict.fromkeys((*theirs, *ours)):
        if theirs.get(key) != ours.get(key):
            sides = (theirs.get(key, _UNSET), ours.get(key, _UNSET))
            yield f"{option}.{key}={sides[0]}", f"{option}.{key}={sides[1]}"
