"""Look at every medium of a source, at several at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

from runner.config.schema import SourceKind
from runner.core.errors import UserError
from runner.core.file_identity import Identity, identity_of
from runner.data.sources.listing import ListedMedia, Listing, open_listing
from runner.data.sources.media_reader import ArchiveExtractor, MediaReader
from runner.data.sources.model import Scan, SourceMedia
from runner.data.sources.scan_index import ScanIndex

Progress = Callable[[int, int], None]
# Given the entries of a source, what a real run does with them beyond looking: keeps those of an
# archive (a Keeper, or None for other sources). None when it is to leave no trace.
Keep = Callable[[Sequence[ListedMedia]], AbstractContextManager[ArchiveExtractor | None] | None]

# How much of the looking a kill can lose.
SAVE_SECONDS = 5.0


def workers() -> int:
    """Threads that read media."""
    return min(8, os.cpu_count() or 1)


def scan(
    kind: str,
    path: Path,
    *,
    max_bytes: int,
    progress: Progress | None = None,
    memos: Path | None = None,
    keep: Keep | None = None,
) -> Scan:
    """Look at every medium of a source, as `locate` gave it. Writes nothing without `keep`.

    max_bytes: the most an archive may hold unpacked. progress: called with (done, all). memos:
    where it is noted what was found before. Raises UserError for an archive that `check_archive`
    refuses, a caption that is not UTF-8, a wrong JSONL line, and a source without one readable
    medium.
    """
    with open_listing(kind, path, max_bytes) as listing:
        keeping = keep(listing.entries) if keep is not None else None
        memo = ScanIndex.load(memos, path) if memos is not None else None
        if keeping is not None and len(_recalled(listing, memo)) == len(listing.entries):
            # What is known was kept, or can be by itself: nobody need be waited for.
            keeping = nullcontext()
        with keeping or nullcontext() as extractor:
            # Another run may have looked at it while this one waited for its turn.
            memo = ScanIndex.load(memos, path) if memos is not None else None
            found = _read_all(listing, memo, extractor, keeping is not None, progress)
    items = [item for _, item in found if isinstance(item, SourceMedia)]
    ignored = sorted((entry.name, why) for entry, why in found if isinstance(why, str))
    if not items:
        why = f"; {ignored[0][0]}: {ignored[0][1]}" if ignored else ""
        raise UserError(f"{path} holds no picture or clip that can be read{why}")
    items.sort(key=lambda item: item.name)
    return Scan(cast(SourceKind, kind), path, tuple(items), tuple(ignored))


def _read_all(
    listing: Listing,
    memo: ScanIndex | None,
    extractor: ArchiveExtractor | None,
    save: bool,
    progress: Progress | None,
) -> list[tuple[ListedMedia, SourceMedia | str]]:
    entries = listing.entries
    known = _recalled(listing, memo)
    found: list[tuple[ListedMedia, SourceMedia | str]] = [
        (entries[n], item) for n, item in known.items()
    ]
    rest = [entry for number, entry in enumerate(entries) if number not in known]
    if progress is not None and known:
        progress(len(known), len(entries))
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers())
    saved = time.monotonic()
    try:
        results = pool.map(MediaReader(extractor, listing.identity, stop), rest)
        for entry, (result, began) in zip(rest, results, strict=True):
            found.append((entry, result))
            if memo is not None and isinstance(result, SourceMedia):
                # An archive is one file, read from its listing on.
                memo.note(result, listing.began if entry.archive else began)
            if save and memo is not None and time.monotonic() - saved > SAVE_SECONDS:
                memo.save([entry.name for entry in entries])
                saved = time.monotonic()
            if progress is not None:
                progress(len(found), len(entries))
    finally:
        # An interrupt must not wait for the rest of a large source.
        stop.set()
        pool.shutdown(cancel_futures=True)
        if save and memo is not None:
            memo.save([entry.name for entry in entries])
    return found


def _recalled(listing: Listing, memo: ScanIndex | None) -> dict[int, SourceMedia]:
    """What the memo knows, by the number of the entry."""
    if memo is None:
        return {}
    known: dict[int, SourceMedia] = {}
    for number, entry in enumerate(listing.entries):
        identity = listing.identity if entry.archive else _identity(entry)
        item = memo.recall(entry, identity) if identity is not None else None
        if item is not None:
            known[number] = item
    return known


def _identity(entry: ListedMedia) -> Identity | None:
    try:
        return identity_of(entry.file.stat()) if entry.file is not None else None
    except OSError:
        return None
