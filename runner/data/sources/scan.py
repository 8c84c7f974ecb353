"""Scan all media of a source in parallel."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

from runner.config.dataset_schema import SourceKind
from runner.core.errors import UserError
from runner.core.file_identity import Identity, identity_of
from runner.core.text import printable
from runner.data.sources.captions import AS_WRITTEN, CaptionOptions
from runner.data.sources.listing import ListedMedia, Listing, open_listing
from runner.data.sources.media_reader import ArchiveExtractor, MediaReader
from runner.data.sources.model import Scan, SourceMedia
from runner.data.sources.scan_index import ScanIndex

Progress = Callable[[int, int], None]
# Called with the listed media by a real run. Returns None if nothing may be written, else a context
# manager that yields an ArchiveExtractor, or None for a source that is not an archive.
BeginWriting = Callable[
    [Sequence[ListedMedia]], AbstractContextManager[ArchiveExtractor | None] | None
]

# The index is saved this often; a killed process loses no more than this.
SAVE_SECONDS = 5.0


def workers() -> int:
    """Return the number of threads that read media."""
    return min(8, os.cpu_count() or 1)


def scan(
    kind: str,
    path: Path,
    *,
    max_bytes: int,
    progress: Progress | None = None,
    index_folder: Path | None = None,
    begin_writing: BeginWriting | None = None,
    outputs: Path | None = None,
    reading: CaptionOptions = AS_WRITTEN,
) -> Scan:
    """Scan all media of a source; write nothing without ``begin_writing``.

    Args:
        kind: the source kind, from :func:`locate`.
        path: the source, from :func:`locate`.
        max_bytes: the maximum uncompressed size of an archive.
        progress: called with the numbers of media scanned and in all.
        index_folder: the folder of the scan indexes; None uses no index.
        begin_writing: given by a real run, see :data:`BeginWriting`.
        outputs: the output folder of this run, which is no data.
        reading: how captions are read.

    Raises:
        UserError: :func:`check_archive` refuses the archive, a caption can't be read or decoded,
            a list is wrong, or no media file can be read.
    """
    with open_listing(kind, path, max_bytes, reading, outputs) as listing:
        writing = begin_writing(listing.media) if begin_writing is not None else None
        index = ScanIndex.load(index_folder, path) if index_folder is not None else None
        if writing is not None and len(_recalled(listing, index)) == len(listing.media):
            # Everything is in the index already, so do not wait for a run that unpacks.
            writing = nullcontext()
        with writing or nullcontext() as extractor:
            # Another run may have scanned the source while this one waited.
            index = ScanIndex.load(index_folder, path) if index_folder is not None else None
            results = _read_all(listing, index, extractor, writing is not None, progress)
    media = [item for listed, result in results for item in _items(listed, result)]
    ignored = sorted(
        (printable(listed.name), result) for listed, result in results if isinstance(result, str)
    )
    notices = [printable(notice) for notice in listing.notices]
    if not media:
        reasons = [f"; {name}: {reason}" for name, reason in ignored[:1]]
        reasons += [f". {notice}" for notice in notices]
        raise UserError(f"{path} holds no picture or clip that can be read{''.join(reasons)}")
    media.sort(key=lambda one: one.name)
    return Scan(cast(SourceKind, kind), path, tuple(media), tuple(ignored), tuple(notices))


def _items(listed: ListedMedia, result: SourceMedia | str) -> Iterator[SourceMedia]:
    """Yield the media once for each of its captions."""
    if not isinstance(result, str):
        for caption in (listed.caption, *listed.more_captions):
            yield replace(result, caption=caption, repeats=listed.repeats)


def _read_all(
    listing: Listing,
    index: ScanIndex | None,
    extractor: ArchiveExtractor | None,
    save: bool,
    progress: Progress | None,
) -> list[tuple[ListedMedia, SourceMedia | str]]:
    listed_media = listing.media
    known = _recalled(listing, index)
    results: list[tuple[ListedMedia, SourceMedia | str]] = [
        (listed_media[n], media) for n, media in known.items()
    ]
    rest = [listed for number, listed in enumerate(listed_media) if number not in known]
    if progress is not None and known:
        progress(len(known), len(listed_media))
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers())
    saved = time.monotonic()
    try:
        scanned = pool.map(MediaReader(extractor, listing.identity, stop), rest)
        for listed, (result, began) in zip(rest, scanned, strict=True):
            results.append((listed, result))
            if index is not None and isinstance(result, SourceMedia):
                # An archive has been open since it was listed.
                index.note(result, listing.began if listed.archive else began)
            if save and index is not None and time.monotonic() - saved > SAVE_SECONDS:
                index.save([listed.name for listed in listed_media])
                saved = time.monotonic()
            if progress is not None:
                progress(len(results), len(listed_media))
    finally:
        # An interrupt must not wait for the rest of a large source.
        stop.set()
        pool.shutdown(cancel_futures=True)
        if save and index is not None:
            index.save([listed.name for listed in listed_media])
    return results


def _recalled(listing: Listing, index: ScanIndex | None) -> dict[int, SourceMedia]:
    """Return the media in the index, by their position in the listing."""
    if index is None:
        return {}
    known: dict[int, SourceMedia] = {}
    for number, listed in enumerate(listing.media):
        identity = listing.identity if listed.archive else _identity(listed)
        media = index.recall(listed, identity) if identity is not None else None
        if media is not None:
            known[number] = media
    return known


def _identity(listed: ListedMedia) -> Identity | None:
    try:
        return identity_of(listed.file.stat()) if listed.file is not None else None
    except OSError:
        return None
