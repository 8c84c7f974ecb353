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
from runner.data.select import Source, correction_of, is_refused, would_be_selected
from runner.data.source_options import SourceOptions, source_options
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
        write: whether to extract archives into the shared cache, fetch datasets of the hub and
            save the scan index. If not, nothing is written.
        refused: the reason why the run cannot start; a missing dataset of the hub then raises it.
        watch: shows the download of a dataset of the hub.
        force: whether to resolve branches of the hub again.
    """

    progress: Progress | None = None
    waiting: Callable[[], None] = lambda: None
    write: bool = False
    refused: str | None = None
    watch: Callable[[], AbstractContextManager[DownloadListener]] = lambda: _show_download()
    force: bool = False


def scan_sources(
    config: RunConfig, cwd: Path, cache: SharedCache, scan_options: ScanOptions
) -> tuple[Source, ...]:
    """Scan each source for its media and their captions.

    Args:
        config: the run's config.
        cwd: the folder that relative paths start at.
        cache: the shared cache.
        scan_options: how to scan.

    Raises:
        UserError: a source can't be used, or the shared cache can't be written to.
    """
    from runner.data.sources import scan
    from runner.data.sources.captions import CaptionOptions

    sources: list[Source] = []
    limit = int(config.dataset.max_archive_gb * 1e9)
    # Locate all sources first, since scanning takes long.
    located_sources = [
        _locate_source(options, cwd, cache, scan_options)
        for options in source_options(config.dataset)
    ]
    for located in located_sources:
        options, task = located.options, config.task.name
        unpacked: list[int] = []
        scanned = scan(
            located.source_kind,
            located.path,
            max_bytes=limit,
            progress=_report(scan_options.progress, located.shown),
            index_folder=cache.root / "scans",
            begin_writing=_begin_writing(cache, options, task, scan_options, unpacked.append)
            if scan_options.write
            else None,
            outputs=cache.root.parent,
            reading=CaptionOptions(options.encoding, options.captions),
        )
        sources.append(
            Source(
                options,
                located.source_kind,
                located.shown,
                scanned.media,
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
    options: SourceOptions, cwd: Path, cache: SharedCache, scan_options: ScanOptions
) -> _LocatedSource:
    from runner.data.sources import locate

    if options.source_kind != "hub":
        outputs = cache.root.parent
        kind, path = locate(options.path, options.source_kind, cwd=cwd, outputs=outputs)
        return _LocatedSource(options, kind, path, str(path))
    from runner.hub.dataset import HubDatasets
    from runner.hub.remote import silence_warnings

    silence_warnings()
    datasets = HubDatasets(cache.root)
    if scan_options.write:
        with scan_options.watch() as watcher:
            dataset = datasets.fetch(
                options.path, options.revision, watcher, force=scan_options.force
            )
    else:
        if scan_options.refused and datasets.find(options.path, options.revision) is None:
            raise UserError(scan_options.refused)
        dataset = datasets.planned(options.path, options.revision)
    kind, path = locate(str(dataset.folder), "auto", cwd=cwd)
    return _LocatedSource(options, kind, path, str(dataset), dataset.commit)


def _show_download() -> AbstractContextManager[DownloadListener]:
    from runner.core.console import Console
    from runner.hub.progress import DownloadProgress

    return DownloadProgress(Console.for_stream(sys.stdout))


def _report(progress: Progress | None, path: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None

    def report(done: int, total: int) -> None:
        progress(path, done, total)

    return report


def _begin_writing(
    cache: SharedCache,
    options: SourceOptions,
    task: str,
    scan_options: ScanOptions,
    unpacked: Callable[[int], None],
) -> Callable[[Sequence[ListedMedia]], AbstractContextManager[ArchiveExtractor | None] | None]:
    def begin_writing(
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

        with BulkWriter(cache, "media", str(archive), scan_options.waiting) as writer:
            yield ArchiveExtractor(writer, wanted)
        unpacked(writer.added)

    return begin_writing
