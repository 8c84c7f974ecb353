"""What the stages that fill the cache share: make the missing entries, commit them, link all.

The engine writes into a staging folder of the run's own, never into the store: musubi-tuner
rewrites and deletes files where it works, through links too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from runner.core.atomic import write_text
from runner.core.errors import StageError, UserError
from runner.core.text import counted, named
from runner.pipeline.plan_data import part_of
from runner.pipeline.stages import run_commands
from runner.storage.store import link

if TYPE_CHECKING:
    from runner.pipeline.executor import Context
    from runner.pipeline.model import Stage
    from runner.storage.leases import Record

# How often finished entries are moved into the store while the engine goes on, and how long a file
# must not have changed to be one.
_KEEP_SECONDS = 20.0
_SETTLED_SECONDS = 2.0


def fill(context: Context, name: str, make: Callable[[frozenset[str]], None]) -> None:
    """Bring every entry of a stage into the store, undamaged.

    ``make`` commits the entries it is given (``shelf/name``). Of those that are missing it gets
    the ones that no other process makes; the others are waited for, and made here if that process
    fails or dies. Raises :class:`StageError` for an entry that can't be kept whole.
    """
    made: set[str] = set()
    told: set[str] = set()
    while lacking := _lacking(context, name, made):
        with context.use.ledger.claim(lacking, context.use.run) as (mine, others):
            # Another process may have made some between the look and the claim.
            todo = mine & _lacking(context, name, made) if mine else mine
            if todo:
                make(todo)
                made |= todo
        if not mine:
            _say(context, name, [claim for claim in others if claim.id not in told], lacking)
            told.update(claim.id for claim in others)
            context.use.ledger.wait(others)


def _lacking(context: Context, name: str, made: Collection[str]) -> frozenset[str]:
    """What a stage has to make still; with ``stages.force`` that is all it has not made yet."""
    stage = context.replan().stage(name)
    if stage.state == "skipped":
        return frozenset()
    absent = {e.stored for e in stage.entries if e.stored not in context.facts.cached}
    lost = absent.intersection(made)
    if lost:
        files = [str(context.store.place(one)) for one in sorted(lost)]
        raise StageError(
            f"{named(files, 1)} could not be read back as it was written: check the disk"
        )
    if name in context.config.stages.force:
        return frozenset(entry.stored for entry in stage.entries).difference(made)
    return frozenset(absent)


def _say(context: Context, name: str, claims: Collection[Record], lacking: Collection[str]) -> None:
    """One line about claims that are waited for."""
    if not claims:
        return
    number = sum(len(claim.names.intersection(lacking)) for claim in claims)
    what = {"dataset": "item", "latents": "latent", "text": "caption"}[name]
    who = named([claim.who for claim in claims], 3)
    doing = "unpacks" if name == "dataset" else "encodes"
    context.console.line(
        f"      waiting for {counted(number, what)} that another run {doing}: {who}"
    )


def fill_and_link(context: Context, name: str) -> None:
    """Run one encoding stage: afterwards the run's ``cache`` holds its items and nothing else.

    Raises :class:`StageError` when the engine fails or leaves an entry out.
    """
    fill(context, name, lambda todo: _encode(context, name, todo))
    stage = context.plan.stage(name)
    link_entries(context, stage)
    encodings = (context.plan.stage("latents"), context.plan.stage("text"))
    tidy(
        context.run_dir / "cache",
        {context.run_dir / p for s in encodings for e in s.entries for p in e.links},
    )


def link_entries(context: Context, stage: Stage) -> None:
    """Put the stage's entries into the run's folder, in the order of their names there.

    Those that a skipped stage lacks are left out; there is then no training that wants them.
    """
    cached = [entry for entry in stage.entries if entry.stored in context.facts.cached]
    places = {place: entry.stored for entry in cached for place in entry.links}
    for place, stored in sorted(places.items()):
        link(context.store.place(stored).absolute(), context.run_dir / place)


def tidy(folder: Path, keep: Collection[Path]) -> None:
    """Remove every file below ``folder`` that is not to be kept: an earlier attempt left it."""
    for file in sorted(folder.rglob("*")):
        if file not in keep and (file.is_symlink() or not file.is_dir()):
            file.unlink()


def _encode(context: Context, name: str, todo: frozenset[str]) -> None:
    stage = part_of(context.config, context.facts, context.engine, context.plan.stage(name), todo)
    staging = context.run_dir / "staging"
    folders = sorted(_folders(staging, name, stage.files))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for file, text in stage.files:
        write_text(context.run_dir / file, text)
    keeper = _Keeper(context, stage, todo, folders)
    with context.console.bar("encoded", stage.missing) as bar:

        def tick() -> None:
            keeper.keep_finished()
            bar.update(min(stage.missing, keeper.count()))

        try:
            run_commands(context, stage, tick)
        except BaseException:
            # Hours of encoding are kept when the engine fails late, or is stopped.
            with suppress(OSError):
                keeper.keep(lambda file: _whole(file) and keeper.is_current(file))
            raise
        keeper.keep()
        bar.update(min(stage.missing, keeper.count()))
    for entry in stage.entries:
        if entry.stored in todo and entry.stored not in keeper.kept:
            raise StageError(f"the engine made no {entry.produced}; see {context.log(name)}")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class _Keeper:
    """Moves what the engine made into the store, in place of what is damaged or not wanted."""

    def __init__(
        self, context: Context, stage: Stage, todo: Collection[str], folders: Collection[Path]
    ) -> None:
        self.context, self.folders = context, folders
        self.wanted = {entry.produced: entry for entry in stage.entries if entry.stored in todo}
        # The files of a person's that are encoded where they lie, by the name of the item.
        self.media = {
            item.id: item.media
            for item in context.facts.selection.items
            if item.media.file is not None and not item.as_rgb
        }
        self.kept: set[str] = set()
        self._last = time.monotonic()

    def count(self) -> int:
        """How many entries were made so far."""
        return len(self.kept) + len(self._made())

    def keep_finished(self) -> None:
        """Now and then, what is written to its end, so that a power cut costs minutes at most."""
        if time.monotonic() - self._last < _KEEP_SECONDS:
            return
        before = time.time() - _SETTLED_SECONDS
        self.keep(lambda file: file.stat().st_mtime < before and _whole(file))
        self._last = time.monotonic()

    def keep(self, which: Callable[[Path], bool] = lambda _: True) -> None:
        """Commit the files that ``which`` accepts.

        Raises :class:`UserError` when a person has changed a file while it was encoded.
        """
        for file in self._made():
            entry = self.wanted.get(file.name)
            if entry is not None and which(file):
                self._check(file)
                store = self.context.store
                store.commit(entry.shelf, entry.name, file, entry.made_of, replace=True)
                self.kept.add(entry.stored)

    def is_current(self, file: Path) -> bool:
        """Whether what this was made of is still the same."""
        try:
            self._check(file)
        except UserError:
            return False
        return True

    def _check(self, file: Path) -> None:
        from runner.data.sources import check_unchanged

        media = self.media.get(file.name.partition("_")[0])
        if media is not None:
            check_unchanged([media])

    def _made(self) -> list[Path]:
        return [
            file
            for folder in self.folders
            if folder.is_dir()
            for file in folder.iterdir()
            if file.suffix == ".safetensors" and file.name[0] != "."
        ]


def _whole(file: Path) -> bool:
    """Whether a cache file was written to its end: its header says how long it must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False


def _folders(staging: Path, name: str, files: tuple[tuple[str, str], ...]) -> set[Path]:
    return {
        staging / Path(file).stem
        for file, _ in files
        if file.startswith(f"staging/{name}") and file.endswith(".jsonl")
    }
