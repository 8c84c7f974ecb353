"""Bytes of items that were looked at, copied out or found unchanged."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from runner.core.errors import UserError
from runner.core.file_identity import identity_of
from runner.data.sources.archive import open_archive
from runner.data.sources.media_reader import hashed, rgb_png
from runner.data.sources.model import SourceMedia
from runner.data.sources.scan import workers
from runner.storage.bulk_writer import BulkWriter


def unpack(
    items: Sequence[SourceMedia], writer: BulkWriter, progress: Callable[[int], None]
) -> None:
    """Make the entries of `items` in the store, at several at once; those that are there stay.

    progress: called with how many are through. Raises UserError for a source that has changed since
    it was looked at, or can't be read.
    """
    stop = threading.Event()

    def one(item: SourceMedia) -> None:
        if stop.is_set() or not writer.claim(item.cache_key):
            return
        digests: list[str] = []
        file = writer.write(
            lambda write: digests.append(
                _copy(item, archives, write, as_rgb=item.as_rgb, stop=stop)
            )
        )
        writer.add(file, item.cache_key, item.cache_inputs, digests[0])

    with _archives(items) as archives:
        pool = ThreadPoolExecutor(workers())
        try:
            for done, _ in enumerate(pool.map(one, items), 1):
                progress(done)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_unchanged(items: Iterable[SourceMedia]) -> None:
    """Raise UserError for a file of a person's that is no longer what was looked at.

    Its times tell; where they differ it is read again.
    """
    for item in items:
        if item.file is None:
            continue
        with _open_media(item, {}) as stream:
            if identity_of(os.fstat(stream.fileno())) != item.identity:
                _check(item, hashed(stream, None)[0])


def _check(item: SourceMedia, digest: str) -> None:
    if digest != item.sha256:
        raise UserError(f"{item.name} has changed since it was looked at: start again")


def _copy(
    item: SourceMedia,
    archives: dict[Path, zipfile.ZipFile],
    write: Callable[[bytes], object],
    *,
    as_rgb: bool,
    stop: threading.Event | None = None,
) -> str:
    """Give an item's bytes, or the RGB picture, to `write`; the sha256 of what was given."""
    held = io.BytesIO()
    with _open_media(item, archives) as source:
        _check(item, hashed(source, held.write if as_rgb else write, stop)[0])
    if not as_rgb:
        return item.sha256
    held.seek(0)
    png = rgb_png(held)
    write(png)
    return hashlib.sha256(png).hexdigest()


@contextmanager
def _archives(items: Iterable[SourceMedia]) -> Iterator[dict[Path, zipfile.ZipFile]]:
    """Each archive of the items, opened once: finding what is in one takes a while."""
    with ExitStack() as stack:
        paths = dict.fromkeys(item.archive for item in items if item.archive is not None)
        yield {path: stack.enter_context(open_archive(path)) for path in paths}


@contextmanager
def _open_media(item: SourceMedia, archives: dict[Path, zipfile.ZipFile]) -> Iterator[BinaryIO]:
    if item.file is not None:
        try:
            stream = item.file.open("rb")
        except OSError as error:
            raise UserError(f"{item.file} can't be read: {error.strerror}") from None
        with stream:
            yield stream
        return
    if item.archive is None or item.member is None:
        raise ValueError(f"item {item.name!r} has no source")
    try:
        with archives[item.archive].open(item.member) as member:
            yield cast(BinaryIO, member)
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{item.name} in {item.archive} can't be read: {error}") from None
