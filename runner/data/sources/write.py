"""Extract scanned media into the shared cache, or check that they have not changed."""

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
    media: Sequence[SourceMedia], writer: BulkWriter, progress: Callable[[int], None]
) -> None:
    """Write media into the shared cache, several at once; existing entries are kept.

    Args:
        media: the media to write.
        writer: writes to the cache.
        progress: called with the number of media that are done.

    Raises:
        UserError: a source has changed since the scan, or can't be read.
    """
    stop = threading.Event()

    def extract(item: SourceMedia) -> None:
        if stop.is_set() or not writer.reserve(item.cache_key):
            return
        digests: list[str] = []
        file = writer.write(
            lambda write: digests.append(
                _copy(item, archives, write, as_rgb=item.as_rgb, stop=stop)
            )
        )
        writer.add(file, item.cache_key, item.cache_inputs, digests[0])

    with _archives(media) as archives:
        pool = ThreadPoolExecutor(workers())
        try:
            for done, _ in enumerate(pool.map(extract, media), 1):
                progress(done)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_unchanged(media: Iterable[SourceMedia]) -> None:
    """Check that the user's files have not changed since the scan.

    A file whose identity has changed is read again and compared.

    Raises:
        UserError: a file has changed.
    """
    for item in media:
        if item.file is None:
            continue
        with _open_media(item, {}) as stream:
            if identity_of(os.fstat(stream.fileno())) != item.identity:
                _check(item, hashed(stream, None)[0])


def _check(item: SourceMedia, digest: str) -> None:
    if digest != item.sha256:
        raise UserError(f"{item.name} has changed since it was scanned: start again")


def _copy(
    item: SourceMedia,
    archives: dict[Path, zipfile.ZipFile],
    write: Callable[[bytes], object],
    *,
    as_rgb: bool,
    stop: threading.Event | None = None,
) -> str:
    """Pass the bytes, or the RGB picture, to ``write``; return the SHA-256 of what was passed."""
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
def _archives(media: Iterable[SourceMedia]) -> Iterator[dict[Path, zipfile.ZipFile]]:
    """Open each archive of the media once, since opening a large one takes a while."""
    with ExitStack() as stack:
        paths = dict.fromkeys(item.archive for item in media if item.archive is not None)
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
        raise ValueError(f"media {item.name!r} have no source")
    try:
        with archives[item.archive].open(item.member) as member:
            yield cast(BinaryIO, member)
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{item.name} in {item.archive} can't be read: {error}") from None
