"""Stages of a run, one file each; the only place with side effects."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from runner.core import process

if TYPE_CHECKING:
    from runner.pipeline.executor import Context
    from runner.pipeline.model import Stage


def run_stage(name: str, context: Context) -> None:
    """Run one stage of ``context.plan``.

    Raises :class:`runner.core.errors.StageError` when it fails; what it finished before is kept.
    """
    import_module(f"runner.pipeline.stages.{name}").run(context)


def run_commands(context: Context, stage: Stage, on_tick: Callable[[], None] | None = None) -> None:
    """Run a stage's commands in the run's folder, their output in the stage's log.

    Raises :class:`runner.core.errors.StageError` when one fails.
    """
    for command in stage.commands:
        process.run(
            command.argv,
            cwd=context.run_dir,
            env=command.environment(os.environ),
            log=context.log(stage.name),
            on_tick=on_tick,
        )
