"""The sources of a config, looked through; a real run unpacks archives in the same pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.data.select import Source, SourceOptions, is_refused, source_options, would_be_selected
from runner.storage.shared_cache import SharedCache

if TYPE_CHECKING:
    from runner.data.sources.listing import ListedMedia
    from runner.data.sources.media_reader import ArchiveExtractor
    from runner.hub.progress import DownloadListener

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScanOptions:
    """How sources are read. progress: called with a source's path and the media read and found so
    far. waiting: called when another run is unpacking. keep: whether media of archives go into the
    store, datasets of the hub are fetched (`watch` shows that), and what is found out is noted;
    else nothing is written. refused: why a run that was asked for will not begin. force: whether
    branches of the hub are looked up again."""

    progress: Progress | None = None
    waiting: Callable[[], None] = lambda: None
    keep: bool = False
    refused: str | None = None
    watch: Callable[[], AbstractContextManager[DownloadListener]] = lambda: _shown()
    force: bool = False


def scan_sources(
    config: RunConfig, cwd: Path, store: SharedCache, reading: ScanOptions
) -> tuple[Source, ...]:
    """Look into each source: what media it has, and their captions.

    Raises :class:`UserError` for sources that can't be used, and a store that can't be written to.
    """
    from runner.data.sources import scan

    found: list[Source] = []
    limit = int(config.dataset.max_archive_gb * 1e9)
    places = [
        # All are there before the first is read, which can take long.
        _place(options, cwd, store, reading)
        for options in source_options(config.dataset)
    ]
    for place in places:
        options, task = place.options, config.task.name
        unpacked: list[int] = []
        scanned = scan(
            place.source_kind,
            place.path,
            max_bytes=limit,
            progress=_report(reading.progress, place.shown),
            memos=store.root / "scans",
            keep=_keep(store, options, task, reading, unpacked.append) if reading.keep else None,
        )
        found.append(
            Source(
                options,
                place.source_kind,
                place.shown,
                scanned.items,
                scanned.ignored,
                place.commit,
                sum(unpacked),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class _LocatedSource:
    """Where one source lies on this machine, and as what it is shown."""

    options: SourceOptions
    source_kind: str
    path: Path
    shown: str
    commit: str | None = None


def _place(
    options: SourceOptions, cwd: Path, store: SharedCache, reading: ScanOptions
) -> _LocatedSource:
    from runner.data.sources import locate

    if options.source_kind != "hub":
        kind, path = locate(options.path, options.source_kind, cwd=cwd)
        return _LocatedSource(options, kind, path, str(path))
    from runner.hub.dataset import HubDatasets
    from runner.hub.remote import hush

    hush()
    datasets = HubDatasets(store.root)
    if reading.keep:
        with reading.watch() as watcher:
            here = datasets.fetch(options.path, options.revision, watcher, force=reading.force)
    else:
        if reading.refused and datasets.find(options.path, options.revision) is None:
            raise UserError(reading.refused)
        here = datasets.planned(options.path, options.revision)
    kind, path = locate(str(here.folder), "auto", cwd=cwd)
    return _LocatedSource(options, kind, path, str(here), here.commit)


def _shown() -> AbstractContextManager[DownloadListener]:
    from runner.core.console import Console
    from runner.hub.progress import DownloadProgress

    return DownloadProgress(Console.for_stream(sys.stdout))


def _report(progress: Progress | None, path: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None

    def report(done: int, total: int) -> None:
        progress(path, done, total)

    return report


def _keep(
    store: SharedCache,
    options: SourceOptions,
    task: str,
    reading: ScanOptions,
    unpacked: Callable[[int], None],
) -> Callable[[Sequence[ListedMedia]], AbstractContextManager[ArchiveExtractor | None] | None]:
    def keep(
        entries: Sequence[ListedMedia],
    ) -> AbstractContextManager[ArchiveExtractor | None] | None:
        # What will be refused leaves no trace.
        if is_refused(entries, options, task):
            return None
        if entries[0].archive is None:
            return nullcontext()
        return unpacking(entries[0].archive)

    @contextmanager
    def unpacking(archive: Path) -> Iterator[ArchiveExtractor]:
        from runner.data.sources.media_reader import ArchiveExtractor
        from runner.storage.bulk_writer import BulkWriter

        with BulkWriter(store, "media", str(archive), reading.waiting) as writer:
            yield ArchiveExtractor(writer, lambda item: would_be_selected(item, options, task))
        unpacked(writer.added)

    return keep
