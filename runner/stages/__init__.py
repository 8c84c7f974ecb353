"""Stages of a run, one file each; the only place with side effects."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.execute import Context


def run_stage(name: str, context: Context) -> None:
    """Run one stage of ``context.plan``.

    Raises :class:`runner.errors.StageError` when it fails; what it finished before is kept.
    """
    import_module(f"runner.stages.{name}").run(context)
