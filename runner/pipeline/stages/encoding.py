"""Base of the encoding stages: plan missing entries, run the engine, link the results.

The engine writes into a staging folder of the run, never into the shared cache: musubi-tuner
rewrites and deletes files in its output folder, even through links.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from runner.core.atomic import write_text
from runner.core.command import Command
from runner.core.errors import StageError, UserError
from runner.core.text import counted, named
from runner.data.sources import check_unchanged
from runner.engines.base import EARLIER_ENCODINGS, Engine, Job
from runner.formats.dataset_toml import DatasetTable
from runner.formats.dataset_toml import render as render_dataset
from runner.pipeline.context import Context
from runner.pipeline.model import CacheEntry, Inputs, Planning, StagePlan
from runner.pipeline.stages.base import HELD_OUT_ITEMS, MEDIA, TRAINING_ITEMS, Stage, run_commands
from runner.pipeline.stages.filling import WorkWords, fill, link_entries, tidy
from runner.storage.shared_cache import cache_key

# How often finished files are committed while the engine runs, and how long a file must have been
# unchanged to count as finished.
_COMMIT_SECONDS = 20.0
_UNCHANGED_SECONDS = 2.0


@dataclass(frozen=True)
class Encodings:
    """The encoded entries that a run needs, and the engine's input for the missing ones.

    Attributes:
        wanted: all entries, by key.
        missing: number of entries that the cache does not have.
        files: path and text of each file that describes the missing ones.
        tables: their tables of dataset.toml.
    """

    wanted: Mapping[str, CacheEntry]
    missing: int
    files: Sequence[tuple[str, str]]
    tables: Sequence[DatasetTable]


class Encoding(Stage, Protocol):
    """A stage whose results are entries of the shared cache, keyed by their cache inputs.

    Attributes:
        work: words for its progress.
        what: its results, as named in messages.
    """

    needs: tuple[str, ...] = (MEDIA,)
    runs_when_skipped: bool = True
    work: WorkWords
    what: str

    def encodings(self, inputs: Inputs) -> Encodings:
        """List the entries that the run needs, and those that are missing; pure."""

    def command(self, engine: Engine, job: Job, dataset_toml: str) -> Command:
        """Return the engine's command for this stage; pure."""

    def plan(self, planning: Planning) -> StagePlan:
        """Plan the encoding of missing entries; pure.

        Raises:
            UserError: the stage is skipped but entries needed for training are missing.
        """
        planned = self._planned(planning.inputs, planning.engine)
        self._refuse_gaps(planning, planned.entries)
        return planned

    def _planned(self, inputs: Inputs, engine: Engine) -> StagePlan:
        encodings = self.encodings(inputs)
        missing, files = encodings.missing, list(encodings.files)
        toml = f"staging/{self.name}.toml"
        if missing:
            files.append((toml, render_dataset(encodings.tables)))
        kept = len(encodings.wanted) - missing
        noun = self.work.noun
        summary = counted(len(encodings.wanted), noun)
        if missing:
            summary = f"{counted(missing, noun)} to encode" + (f", {kept} cached" if kept else "")
        return StagePlan(
            self.name,
            summary,
            "to run" if missing else "done",
            commands=(self.command(engine, inputs.job, toml),) if missing else (),
            files=tuple(files),
            entries=tuple(encodings.wanted.values()),
            missing=missing,
            outputs=("cache",),
            without_commands="keeps what was encoded in the shared cache, and fills cache/ from it",
        )

    def part(self, context: Context, todo: Collection[str]) -> StagePlan:
        """Plan the stage for some of its entries, given as ``namespace/key``.

        The others exist, or another process makes them.
        """
        inputs, planned = context.inputs, context.plan.stage(self.name)
        rest = frozenset(entry.full_key for entry in planned.entries).difference(todo)
        config = replace(inputs.config, stages=replace(inputs.config.stages, force=[]))
        return self._planned(replace(inputs, config=config, cached=rest), context.engine)

    def _refuse_gaps(self, planning: Planning, wanted: Sequence[CacheEntry]) -> None:
        """Raise :class:`UserError` if the stage is skipped but training needs missing entries.

        The trainer silently ignores items without a cache file.
        """
        inputs = planning.inputs
        # Without the weights the keys are not known; this is checked again once they are present.
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
        """Encode missing entries, and link all into the run's ``cache``; remove other files there.

        Raises:
            StageError: the engine failed, or did not make an entry.
        """
        # The commands may differ from the plan: other runs may make entries, damage adds some.
        context.launched[self.name] = []
        fill(context, self.name, self.work, lambda todo: _encode(context, self, todo))
        link_entries(context, context.plan.stage(self.name))
        kept = {context.run_dir / p for entry in context.plan.entries for p in entry.links}
        tidy(context.run_dir / "cache", kept)


def cache_inputs_to_use(
    inputs: Inputs, namespace: str, acceptable: Sequence[dict[str, Any]], *, force: bool
) -> dict[str, Any]:
    """Choose the entry to use, by its cache inputs; pure.

    An entry of an earlier version is used under the key that it has. Nothing is renamed or copied,
    so processes need not agree on it, and a damaged one is made again under the key of today.

    Args:
        inputs: the inputs of the plan.
        namespace: the namespace of the entry.
        acceptable: cache inputs without the engine that encoded, the preferred ones first and those
            to encode, if nothing else exists, last.
        force: whether to encode in any case.

    Returns:
        The cache inputs of the first that exists, or those to encode.
    """
    own = inputs.own_encoding
    encoders: list[dict[str, str]] = [{}, *({"engine": name} for name in EARLIER_ENCODINGS)]
    if own is not None:
        encoders = [{"engine": own}]
    if not force:
        for cache_inputs in acceptable:
            for encoder in encoders:
                if f"{namespace}/{cache_key(cache_inputs | encoder)}" in inputs.cached:
                    return cache_inputs | encoder
    return acceptable[-1] | encoders[0]


def add_link(wanted: dict[str, CacheEntry], entry: CacheEntry) -> bool:
    """Add an entry to ``wanted``, or its links to the entry with the same key.

    Returns:
        Whether the entry was new.
    """
    known = wanted.get(entry.key)
    if known is None:
        wanted[entry.key] = entry
        return True
    wanted[entry.key] = replace(known, links=known.links + entry.links)
    return False


def _encode(context: Context, stage: Encoding, todo: frozenset[str]) -> None:
    planned = stage.part(context, todo)
    staging = context.run_dir / "staging"
    folders = sorted(_folders(staging, planned))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for file, text in planned.files:
        write_text(context.run_dir / file, text)
    committer = _EncodingCommitter(context, planned, todo, folders)
    with context.console.bar("encoded", planned.missing) as bar:

        def tick() -> None:
            committer.commit_finished()
            bar.update(min(planned.missing, committer.count()))

        try:
            run_commands(context, planned, tick)
        except BaseException:
            # Hours of encoding are kept when the engine fails late, or is stopped.
            with suppress(OSError):
                committer.commit(lambda file: _is_complete(file) and committer.is_current(file))
            raise
        committer.commit()
        bar.update(min(planned.missing, committer.count()))
    for entry in planned.entries:
        if entry.full_key in todo and entry.full_key not in committer.committed:
            raise StageError(f"the engine made no {entry.produced}; see {context.log(stage.name)}")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class _EncodingCommitter:
    """Commits the files that the engine made to the shared cache, replacing damaged entries."""

    def __init__(
        self, context: Context, stage: StagePlan, todo: Collection[str], folders: Collection[Path]
    ) -> None:
        self.context, self.folders = context, folders
        self.wanted = {entry.produced: entry for entry in stage.entries if entry.full_key in todo}
        # The user's own files that are encoded in place, by item id.
        self.media = {
            item.id: item.media
            for item in context.inputs.selection.items
            if item.media.file is not None and not item.cached
        }
        self.committed: set[str] = set()
        self._last = time.monotonic()

    def count(self) -> int:
        """Count the entries made so far."""
        return len(self.committed) + len(self._made())

    def commit_finished(self) -> None:
        """Commit finished files from time to time, so that a crash loses little work."""
        if time.monotonic() - self._last < _COMMIT_SECONDS:
            return
        before = time.time() - _UNCHANGED_SECONDS
        self.commit(lambda file: file.stat().st_mtime < before and _is_complete(file))
        self._last = time.monotonic()

    def commit(self, which: Callable[[Path], bool] = lambda _: True) -> None:
        """Commit the files that ``which`` accepts.

        Raises:
            UserError: the user changed a media file while it was encoded.
        """
        for file in self._made():
            entry = self.wanted.get(file.name)
            if entry is not None and which(file):
                self._check(file)
                cache = self.context.cache
                cache.commit(entry.namespace, entry.key, file, entry.cache_inputs, replace=True)
                self.committed.add(entry.full_key)

    def is_current(self, file: Path) -> bool:
        """Return whether the media file it was made from is unchanged."""
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


def _is_complete(file: Path) -> bool:
    """Return whether a cache file is complete; its header gives its length."""
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
