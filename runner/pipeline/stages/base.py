"""What a stage is: how it is planned, and how it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from runner.config.schema import RunConfig
from runner.core import process
from runner.engines.base import Engine, Job
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, RunEnvironment, StagePlan

# What stages need of each other: files of the run's folder, and the cached items on either side of
# the validation split.
LORA = "lora.safetensors"
MEDIA = "media in the run's folder"
TRAINING_ITEMS = "cached training items"
HELD_OUT_ITEMS = "cached held-out items"


class Stage(Protocol):
    """One step of a run, with files before it and after it.

    ``needs`` is what it reads of other stages' work, and ``makes`` what it alone can bring: a stage
    that needs what a skipped one makes is skipped too. What lies in the shared cache is not among
    it, since it may be there whoever made it; ``runs_when_skipped`` is for stages that still take
    such finished work into the run's folder. Before a stage that ``refreshes_plan`` every entry
    that the plan counts on is checked; encoding stages do so themselves, and later ones have all
    they need.
    """

    name: str
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    runs_when_skipped: bool = False
    refreshes_plan: bool = False

    def problems(self, config: RunConfig, readers: Collection[str]) -> Iterator[str]:
        """Every rule on its being skipped or forced that ``config`` breaks; pure.

        ``readers`` are the stages that need what it makes and are not named as skipped.
        """
        return iter(())

    def refusal(self, config: RunConfig, environment: RunEnvironment) -> str | None:
        """Why a run can't begin on this machine, though it can be planned; pure."""
        return None

    def missing_from(self, engine: Engine, job: Job) -> str | None:
        """What a person should know of an engine that has no such stage; None if it has; pure."""
        return None

    def plan(self, planning: Planning) -> StagePlan:
        """What it would do; pure.

        Raises :class:`runner.core.errors.UserError` for what can't be.
        """

    def run(self, context: Context) -> None:
        """Do what is to be done.

        Raises :class:`runner.core.errors.StageError` when it fails; what it finished is kept.
        """


def run_commands(
    context: Context,
    stage: StagePlan,
    on_tick: Callable[[], None] | None = None,
    *,
    variables: Mapping[str, str] = MappingProxyType({}),
    explain: Callable[[Path], str] | None = None,
) -> None:
    """Run a stage's commands in the run's folder, their output in the stage's log.

    Args:
        context: what the run works with.
        stage: the plan of the stage.
        on_tick: called a few times a second.
        variables: environment variables that are set besides.
        explain: makes a line of the log of one that failed; the engine does, unless given.

    Raises:
        StageError: one failed.
    """
    for command in stage.commands:
        context.launched.setdefault(stage.name, []).append(command)
        process.run(
            command.argv,
            cwd=context.run_dir,
            env={**command.environment(os.environ), **variables},
            log=context.log(stage.name),
            on_tick=on_tick,
            explain=explain or context.engine.failure,
        )
