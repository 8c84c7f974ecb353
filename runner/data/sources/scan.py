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

from runner.config.schema import SourceKind
from runner.core.errors import UserError
from runner.core.file_identity import Identity, identity_of
from runner.core.text import printable
from runner.data.sources.captions import AS_WRITTEN, CaptionOptions
from runner.data.sources.listing import ListedMedia, Listing, open_listing
from runner.data.sources.media_reader import ArchiveExtractor, MediaReader
from runner.data.sources.model import Scan, SourceMedia
from runner.data.sources.scan_index import ScanIndex

Progress = Callable[[int, int], None]
# Callback of a real run. It gets the listed media and returns None if nothing may be written, else
# a context manager that yields an ArchiveExtractor, or None for sources that are not archives.
Keep = Callable[[Sequence[ListedMedia]], AbstractContextManager[ArchiveExtractor | None] | None]

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
    memos: Path | None = None,
    keep: Keep | None = None,
    outputs: Path | None = None,
    reading: CaptionOptions = AS_WRITTEN,
) -> Scan:
    """Scan all media of a source; write nothing without ``keep``.

    Args:
        kind: the source kind, from :func:`locate`.
        path: the source, from :func:`locate`.
        max_bytes: the maximum uncompressed size of an archive.
        progress: called with the numbers of media scanned and in all.
        memos: the folder of scan indexes, None to use none.
        keep: called with the listed media, for a real run.
        outputs: the output folder of this run, which is no data.
        reading: how captions are read.

    Raises:
        UserError: :func:`check_archive` refuses the archive, a caption can't be read or decoded,
            a list is wrong, or no media file can be read.
    """
    with open_listing(kind, path, max_bytes, reading, outputs) as listing:
        keeping = keep(listing.entries) if keep is not None else None
        index = ScanIndex.load(memos, path) if memos is not None else None
        if keeping is not None and len(_recalled(listing, index)) == len(listing.entries):
            # Everything is in the index already, so do not wait for a run that unpacks.
            keeping = nullcontext()
        with keeping or nullcontext() as extractor:
            # Another run may have scanned the source while this one waited.
            index = ScanIndex.load(memos, path) if memos is not None else None
            results = _read_all(listing, index, extractor, keeping is not None, progress)
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
    entries = listing.entries
    known = _recalled(listing, index)
    results: list[tuple[ListedMedia, SourceMedia | str]] = [
        (entries[n], media) for n, media in known.items()
    ]
    rest = [listed for number, listed in enumerate(entries) if number not in known]
    if progress is not None and known:
        progress(len(known), len(entries))
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
                index.save([listed.name for listed in entries])
                saved = time.monotonic()
            if progress is not None:
                progress(len(results), len(entries))
    finally:
        # An interrupt must not wait for the rest of a large source.
        stop.set()
        pool.shutdown(cancel_futures=True)
        if save and index is not None:
            index.save([listed.name for listed in entries])
    return results


def _recalled(listing: Listing, index: ScanIndex | None) -> dict[int, SourceMedia]:
    """Return the media in the index, by their position in the listing."""
    if index is None:
        return {}
    known: dict[int, SourceMedia] = {}
    for number, listed in enumerate(listing.entries):
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
