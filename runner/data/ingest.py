"""Scan the sources of a config; a real run also extracts archives in the same pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.data.select import (
    Source,
    SourceOptions,
    correction_of,
    is_refused,
    source_options,
    would_be_selected,
)
from runner.storage.shared_cache import SharedCache

if TYPE_CHECKING:
    from runner.data.corrections.model import Correction
    from runner.data.sources import SourceMedia
    from runner.data.sources.listing import ListedMedia
    from runner.data.sources.media_reader import ArchiveExtractor
    from runner.hub.progress import DownloadListener

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScanOptions:
    """Options for scanning sources.

    Attributes:
        progress: called with a source's path and the numbers of media scanned and in all.
        waiting: called when another run is extracting the same archive.
        keep: whether to extract archives into the shared cache, fetch datasets of the hub, and save
            the scan index; otherwise nothing is written.
        refused: the reason why the run cannot start; a missing dataset of the hub then raises it.
        watch: shows the download of a dataset of the hub.
        force: whether to resolve branches of the hub again.
    """

    progress: Progress | None = None
    waiting: Callable[[], None] = lambda: None
    keep: bool = False
    refused: str | None = None
    watch: Callable[[], AbstractContextManager[DownloadListener]] = lambda: _shown()
    force: bool = False


def scan_sources(
    config: RunConfig, cwd: Path, store: SharedCache, reading: ScanOptions
) -> tuple[Source, ...]:
    """Scan each source for its media and their captions.

    Args:
        config: the run's config.
        cwd: the folder that relative paths start at.
        store: the shared cache.
        reading: how to scan.

    Raises:
        UserError: a source can't be used, or the shared cache can't be written to.
    """
    from runner.data.sources import scan
    from runner.data.sources.captions import CaptionOptions

    sources: list[Source] = []
    limit = int(config.dataset.max_archive_gb * 1e9)
    # Locate all sources first, since scanning takes long.
    located_sources = [
        _locate_source(options, cwd, store, reading) for options in source_options(config.dataset)
    ]
    for located in located_sources:
        options, task = located.options, config.task.name
        unpacked: list[int] = []
        scanned = scan(
            located.source_kind,
            located.path,
            max_bytes=limit,
            progress=_report(reading.progress, located.shown),
            memos=store.root / "scans",
            keep=_keep(store, options, task, reading, unpacked.append) if reading.keep else None,
            outputs=store.root.parent,
            reading=CaptionOptions(options.encoding, options.captions),
        )
        sources.append(
            Source(
                options,
                located.source_kind,
                located.shown,
                scanned.items,
                scanned.ignored,
                located.commit,
                sum(unpacked),
                scanned.notices,
            )
        )
    return tuple(sources)


@dataclass(frozen=True)
class _LocatedSource:
    """The path of one source on this computer, and its name in messages."""

    options: SourceOptions
    source_kind: str
    path: Path
    shown: str
    commit: str | None = None


def _locate_source(
    options: SourceOptions, cwd: Path, store: SharedCache, reading: ScanOptions
) -> _LocatedSource:
    from runner.data.sources import locate

    if options.source_kind != "hub":
        outputs = store.root.parent
        kind, path = locate(options.path, options.source_kind, cwd=cwd, outputs=outputs)
        return _LocatedSource(options, kind, path, str(path))
    from runner.hub.dataset import HubDatasets
    from runner.hub.remote import hush

    hush()
    datasets = HubDatasets(store.root)
    if reading.keep:
        with reading.watch() as watcher:
            dataset = datasets.fetch(options.path, options.revision, watcher, force=reading.force)
    else:
        if reading.refused and datasets.find(options.path, options.revision) is None:
            raise UserError(reading.refused)
        dataset = datasets.planned(options.path, options.revision)
    kind, path = locate(str(dataset.folder), "auto", cwd=cwd)
    return _LocatedSource(options, kind, path, str(dataset), dataset.commit)


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
        media: Sequence[ListedMedia],
    ) -> AbstractContextManager[ArchiveExtractor | None] | None:
        # Write nothing for a source that will be rejected.
        if is_refused(media, options, task):
            return None
        if media[0].archive is None:
            return nullcontext()
        return unpacking(media[0].archive)

    def wanted(media: SourceMedia) -> Correction | None:
        used = would_be_selected(media, options, task)
        return correction_of(media, options, task) if used else None

    @contextmanager
    def unpacking(archive: Path) -> Iterator[ArchiveExtractor]:
        from runner.data.sources.media_reader import ArchiveExtractor
        from runner.storage.bulk_writer import BulkWriter

        with BulkWriter(store, "media", str(archive), reading.waiting) as writer:
            yield ArchiveExtractor(writer, wanted)
        unpacked(writer.added)

    return keep
