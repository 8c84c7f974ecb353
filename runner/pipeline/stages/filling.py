"""Base of the stages that fill the shared cache: make missing entries, link the needed ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from runner.core.errors import StageError
from runner.core.text import counted, named
from runner.pipeline.context import Context
from runner.pipeline.model import StagePlan
from runner.storage.leases import Lease
from runner.storage.shared_cache import link


@dataclass(frozen=True)
class WorkWords:
    """Words for a stage's work in messages: ``latent``, ``encodes``."""

    noun: str
    verb: str


def fill(
    context: Context, name: str, work: WorkWords, make: Callable[[frozenset[str]], None]
) -> None:
    """Make every missing or damaged entry of a stage.

    Entries that another process is making are waited for, and made here if that process fails.

    Args:
        context: the run in progress.
        name: the stage.
        work: words for messages.
        make: makes and commits the entries it is given, as ``namespace/key``; called with the
            missing ones that this process has leased.

    Raises:
        StageError: an entry cannot be read back as it was written.
    """
    made: set[str] = set()
    reported: set[str] = set()
    while missing := _missing_keys(context, name, made):
        with context.use_lease.leases.lease_for_making(missing, context.use_lease.run) as (
            mine,
            others,
        ):
            # Another process may have made some before the lease was taken.
            todo = mine & _missing_keys(context, name, made) if mine else mine
            if todo:
                make(todo)
                made |= todo
                context.mark_made(todo)
        if not mine:
            _say(context, work, [lease for lease in others if lease.id not in reported], missing)
            reported.update(lease.id for lease in others)
            context.use_lease.leases.wait(others)


def _missing_keys(context: Context, name: str, made: Collection[str]) -> frozenset[str]:
    """Return the entries that a stage still has to make; with ``stages.force`` all but ``made``."""
    stage = context.refresh_plan().stage(name)
    if stage.state == "skipped":
        return frozenset()
    missing = {e.full_key for e in stage.entries if e.full_key not in context.inputs.cached}
    lost = missing.intersection(made)
    if lost:
        files = [str(context.cache.path_of(key)) for key in sorted(lost)]
        raise StageError(
            f"{named(files, 1)} could not be read back as it was written: check the disk"
        )
    if name in context.inputs.config.stages.force:
        return frozenset(entry.full_key for entry in stage.entries).difference(made)
    return frozenset(missing)


def _say(
    context: Context, work: WorkWords, leases: Collection[Lease], missing: Collection[str]
) -> None:
    """Print one line about the leases that this run waits for."""
    if not leases:
        return
    number = sum(len(lease.names.intersection(missing)) for lease in leases)
    holders = named([lease.holder for lease in leases], 3)
    context.console.line(
        f"      waiting for {counted(number, work.noun)} that another run {work.verb}: {holders}"
    )


def link_entries(context: Context, stage: StagePlan) -> None:
    """Link the stage's entries into the run's folder, in the order of their names there.

    Missing entries of a skipped stage are not linked; then no training needs them.
    """
    entries = [entry for entry in stage.entries if entry.full_key in context.inputs.cached]
    full_keys = {path: entry.full_key for entry in entries for path in entry.links}
    for path, full_key in sorted(full_keys.items()):
        link(context.cache.path_of(full_key).absolute(), context.run_dir / path)


def tidy(folder: Path, keep: Collection[Path]) -> None:
    """Remove every file below ``folder`` that is not in ``keep``, left by an earlier attempt."""
    for file in sorted(folder.rglob("*")):
        if file not in keep and (file.is_symlink() or not file.is_dir()):
            file.unlink()
