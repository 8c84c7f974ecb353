"""What the stages that fill the cache share: make what is missing, and link what is wanted."""

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
    """What a stage makes and how, in words: ``latent``, ``encodes``."""

    noun: str
    verb: str


def fill(
    context: Context, name: str, work: WorkWords, make: Callable[[frozenset[str]], None]
) -> None:
    """Bring every entry of a stage into the store, undamaged.

    ``name`` is the stage's and ``work`` what it does. ``make`` commits the entries it is given
    (``shelf/name``). Of those that are missing it gets the ones that no other process makes; the
    others are waited for, and made here if that process fails or dies. Raises :class:`StageError`
    for an entry that can't be kept whole.
    """
    made: set[str] = set()
    reported: set[str] = set()
    while missing := _missing_keys(context, name, made):
        with context.use_lease.leases.claim(missing, context.use_lease.run) as (mine, others):
            # Another process may have made some between the look and the claim.
            todo = mine & _missing_keys(context, name, made) if mine else mine
            if todo:
                make(todo)
                made |= todo
                context.mark_made(todo)
        if not mine:
            _say(context, work, [claim for claim in others if claim.id not in reported], missing)
            reported.update(claim.id for claim in others)
            context.use_lease.leases.wait(others)


def _missing_keys(context: Context, name: str, made: Collection[str]) -> frozenset[str]:
    """What a stage has to make still; with ``stages.force`` that is all it has not made yet."""
    stage = context.refresh_plan().stage(name)
    if stage.state == "skipped":
        return frozenset()
    absent = {e.full_key for e in stage.entries if e.full_key not in context.inputs.cached}
    lost = absent.intersection(made)
    if lost:
        files = [str(context.store.place(one)) for one in sorted(lost)]
        raise StageError(
            f"{named(files, 1)} could not be read back as it was written: check the disk"
        )
    if name in context.inputs.config.stages.force:
        return frozenset(entry.full_key for entry in stage.entries).difference(made)
    return frozenset(absent)


def _say(
    context: Context, work: WorkWords, claims: Collection[Lease], missing: Collection[str]
) -> None:
    """One line about claims that are waited for."""
    if not claims:
        return
    number = sum(len(claim.names.intersection(missing)) for claim in claims)
    who = named([claim.who for claim in claims], 3)
    context.console.line(
        f"      waiting for {counted(number, work.noun)} that another run {work.verb}: {who}"
    )


def link_entries(context: Context, stage: StagePlan) -> None:
    """Put the stage's entries into the run's folder, in the order of their names there.

    Those that a skipped stage lacks are left out; there is then no training that wants them.
    """
    cached = [entry for entry in stage.entries if entry.full_key in context.inputs.cached]
    places = {place: entry.full_key for entry in cached for place in entry.links}
    for place, full_key in sorted(places.items()):
        link(context.store.place(full_key).absolute(), context.run_dir / place)


def tidy(folder: Path, keep: Collection[Path]) -> None:
    """Remove every file below ``folder`` that is not to be kept: an earlier attempt left it."""
    for file in sorted(folder.rglob("*")):
        if file not in keep and (file.is_symlink() or not file.is_dir()):
            file.unlink()
