"""Interface of a stage: how it is planned, and how it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from runner.config.schema import RunConfig
from runner.core import process
from runner.core.activity import Stuck
from runner.engines.base import Engine, Job
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, RunEnvironment, StagePlan

# Outputs that stages need from each other: files in the run's folder, and the cache files of the
# items on each side of the validation split.
LORA = "lora.safetensors"
MEDIA = "media in the run's folder"
TRAINING_ITEMS = "cached training items"
HELD_OUT_ITEMS = "cached held-out items"


class Stage(Protocol):
    """One step of a run.

    Attributes:
        name: its name in options, logs and MLflow.
        needs: outputs of other stages that it reads.
        makes: outputs that only it can make; a stage that needs one is skipped with it. Cache
            entries are not among them, since any run may have made them.
        runs_when_skipped: if skipped, it still links existing entries into the run's folder.
        refreshes_plan: the plan's entries are verified before it. The encoding stages verify them
            on their own; later stages need no more.
    """

    name: str
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    runs_when_skipped: bool = False
    refreshes_plan: bool = False

    def problems(self, config: RunConfig, readers: Collection[str]) -> Iterator[str]:
        """Yield one line for each rule on skipping or forcing it that ``config`` breaks; pure.

        ``readers`` are the stages that need its outputs and are not named as skipped.
        """
        return iter(())

    def refusal(self, config: RunConfig, environment: RunEnvironment) -> str | None:
        """Return the reason why a run can be planned but not started on this computer; pure."""
        return None

    def missing_from(self, engine: Engine, job: Job) -> str | None:
        """Return a notice if the engine does not support this stage; None if it does; pure."""
        return None

    def plan(self, planning: Planning) -> StagePlan:
        """Plan the stage; pure.

        Raises:
            UserError: it cannot be planned.
        """

    def run(self, context: Context) -> None:
        """Run the stage.

        Raises:
            StageError: it failed; finished work is kept.
        """


def run_commands(
    context: Context,
    stage: StagePlan,
    on_tick: Callable[[], None] | None = None,
    *,
    variables: Mapping[str, str] = MappingProxyType({}),
    explain: Callable[[Path, int], str] | None = None,
) -> None:
    """Run a stage's commands in the run's folder, with their output in the stage's log.

    Args:
        context: the run in progress.
        stage: the plan of the stage.
        on_tick: called a few times per second.
        variables: additional environment variables.
        explain: turns log and exit code of a failed command into one line; by default the
            engine's method.

    Raises:
        StageError: a command failed.
    """

    def by_engine(log: Path, code: int) -> str:
        return context.engine.failure(log, code, stage.name, context.inputs.job)

    def say(seconds: float) -> None:
        words = process.idle_words(seconds, context.log(stage.name))
        context.console.notice(
            f"stage {stage.name} seems to be stuck, after {words}. It goes on; Ctrl-C ends it, and "
            "stages.timeout_minutes does so by itself."
        )

    minutes = context.inputs.config.stages.timeout_minutes
    stuck = Stuck(say, end_after=None if minutes is None else minutes * 60)
    for command in stage.commands:
        context.launched.setdefault(stage.name, []).append(command)
        process.run(
            command.argv,
            cwd=context.run_dir,
            env={**command.environment(os.environ), **variables},
            log=context.log(stage.name),
            on_tick=on_tick,
            explain=explain or by_engine,
            stuck=stuck,
        )
