"""What the stages that encode share: plan what is missing, have the engine make it, link all.

The engine writes into a staging folder of the run's own, never into the store: musubi-tuner
rewrites and deletes files where it works, through links too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from runner.core.atomic import write_text
from runner.core.command import Command
from runner.core.errors import StageError, UserError
from runner.core.text import counted, named
from runner.data.sources import check_unchanged
from runner.engines.base import Engine, Job
from runner.formats.dataset_toml import DatasetTable
from runner.formats.dataset_toml import render as render_dataset
from runner.pipeline.context import Context
from runner.pipeline.model import CacheEntry, Inputs, Planning, StagePlan
from runner.pipeline.stages.base import HELD_OUT_ITEMS, MEDIA, TRAINING_ITEMS, Stage, run_commands
from runner.pipeline.stages.filling import WorkWords, fill, link_entries, tidy

# How often finished entries are moved into the store while the engine goes on, and how long a file
# must not have changed to be one.
_KEEP_SECONDS = 20.0
_UNCHANGED_SECONDS = 2.0


@dataclass(frozen=True)
class Encodings:
    """What a run wants encoded: entries by their name in the store, and how to make the missing.

    ``files`` and ``tables`` are what the engine is told of the ``missing`` ones.
    """

    wanted: Mapping[str, CacheEntry]
    missing: int
    files: Sequence[tuple[str, str]]
    tables: Sequence[DatasetTable]


class Encoding(Stage, Protocol):
    """A stage whose results are cache files, each named by what goes into it."""

    needs: tuple[str, ...] = (MEDIA,)
    runs_when_skipped: bool = True
    work: WorkWords
    # What is made, as a person is told of it.
    what: str

    def encodings(self, inputs: Inputs) -> Encodings:
        """What the run wants and what of it is missing; pure."""

    def command(self, engine: Engine, job: Job, dataset_toml: str) -> Command:
        """The engine's command for it."""

    def plan(self, planning: Planning) -> StagePlan:
        planned = self._planned(planning.inputs, planning.engine)
        self._refuse_gaps(planning, planned.entries)
        return planned

    def _planned(self, inputs: Inputs, engine: Engine) -> StagePlan:
        found = self.encodings(inputs)
        missing, files = found.missing, list(found.files)
        toml = f"staging/{self.name}.toml"
        if missing:
            files.append((toml, render_dataset(found.tables)))
        kept = len(found.wanted) - missing
        noun = self.work.noun
        summary = counted(len(found.wanted), noun)
        if missing:
            summary = f"{counted(missing, noun)} to encode" + (f", {kept} cached" if kept else "")
        return StagePlan(
            self.name,
            summary,
            "to run" if missing else "done",
            commands=(self.command(engine, inputs.job, toml),) if missing else (),
            files=tuple(files),
            entries=tuple(found.wanted.values()),
            missing=missing,
            outputs=("cache",),
            without_commands="keeps what was encoded in the shared cache, and fills cache/ from it",
        )

    def part(self, context: Context, todo: Collection[str]) -> StagePlan:
        """The stage as it encodes just these (``shelf/name``) of its entries.

        The others are there, or another process makes them.
        """
        inputs, planned = context.inputs, context.plan.stage(self.name)
        rest = frozenset(entry.full_key for entry in planned.entries).difference(todo)
        config = replace(inputs.config, stages=replace(inputs.config.stages, force=[]))
        return self._planned(replace(inputs, config=config, cached=rest), context.engine)

    def _refuse_gaps(self, planning: Planning, wanted: Sequence[CacheEntry]) -> None:
        """Raise :class:`UserError` when a skipped stage lacks what the training wants.

        The trainer passes over items without a cache file and says nothing.
        """
        inputs = planning.inputs
        # Without the weights nobody can tell what the entries are called; they are looked at
        # again once the weights are there.
        must_be_complete = self.name in inputs.config.stages.skip and inputs.weights.present
        if not must_be_complete or TRAINING_ITEMS not in planning.needed:
            return
        absent = [entry for entry in wanted if entry.full_key not in inputs.cached]
        ids = {PurePosixPath(p).name.partition("_")[0] for entry in absent for p in entry.links}
        evaluated = HELD_OUT_ITEMS in planning.needed
        items = [item for item in inputs.selection.items if evaluated or not item.held_out]
        gaps = [item.media.name for item in items if item.id in ids]
        if gaps:
            raise UserError(
                f"stages.skip=[{self.name}], but the {self.what} of {len(gaps)} of "
                f"{counted(len(items), 'item')} are not in the cache, or damaged there: "
                f"{named(gaps)}. They would not be trained on: take {self.name} out of "
                "stages.skip, what is cached is not encoded again."
            )

    def run(self, context: Context) -> None:
        """Afterwards the run's ``cache`` holds its items and nothing else.

        Raises :class:`StageError` when the engine fails or leaves an entry out.
        """
        # Other runs may make some or all of what was planned here, and damage makes more to do.
        context.launched[self.name] = []
        fill(context, self.name, self.work, lambda todo: _encode(context, self, todo))
        link_entries(context, context.plan.stage(self.name))
        kept = {context.run_dir / p for entry in context.plan.entries for p in entry.links}
        tidy(context.run_dir / "cache", kept)


def add_link(wanted: dict[str, CacheEntry], entry: CacheEntry) -> bool:
    """Want an entry, or one that is wanted already at more places; whether it is new."""
    known = wanted.get(entry.name)
    if known is None:
        wanted[entry.name] = entry
        return True
    wanted[entry.name] = replace(known, links=known.links + entry.links)
    return False


def _encode(context: Context, stage: Encoding, todo: frozenset[str]) -> None:
    planned = stage.part(context, todo)
    staging = context.run_dir / "staging"
    folders = sorted(_folders(staging, planned))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for file, text in planned.files:
        write_text(context.run_dir / file, text)
    keeper = _EncodingCommitter(context, planned, todo, folders)
    with context.console.bar("encoded", planned.missing) as bar:

        def tick() -> None:
            keeper.keep_finished()
            bar.update(min(planned.missing, keeper.count()))

        try:
            run_commands(context, planned, tick)
        except BaseException:
            # Hours of encoding are kept when the engine fails late, or is stopped.
            with suppress(OSError):
                keeper.keep(lambda file: _whole(file) and keeper.is_current(file))
            raise
        keeper.keep()
        bar.update(min(planned.missing, keeper.count()))
    for entry in planned.entries:
        if entry.full_key in todo and entry.full_key not in keeper.kept:
            raise StageError(f"the engine made no {entry.produced}; see {context.log(stage.name)}")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class _EncodingCommitter:
    """Moves what the engine made into the store, in place of what is damaged or not wanted."""

    def __init__(
        self, context: Context, stage: StagePlan, todo: Collection[str], folders: Collection[Path]
    ) -> None:
        self.context, self.folders = context, folders
        self.wanted = {entry.produced: entry for entry in stage.entries if entry.full_key in todo}
        # The files of a person's that are encoded where they lie, by the name of the item.
        self.media = {
            item.id: item.media
            for item in context.inputs.selection.items
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
        before = time.time() - _UNCHANGED_SECONDS
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
                store.commit(entry.namespace, entry.name, file, entry.cache_inputs, replace=True)
                self.kept.add(entry.full_key)

    def is_current(self, file: Path) -> bool:
        """Whether what this was made of is still the same."""
        try:
            self._check(file)
        except UserError:
            return False
        return True

    def _check(self, file: Path) -> None:
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


def _folders(staging: Path, planned: StagePlan) -> set[Path]:
    return {
        staging / Path(file).stem
        for file, _ in planned.files
        if file.startswith(f"staging/{planned.name}") and file.endswith(".jsonl")
    }
