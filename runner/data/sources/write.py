"""Extract scanned media into the shared cache, or check that they have not changed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

from runner.core.errors import UserError
from runner.core.file_identity import identity_of
from runner.data.corrections.clips import write_clip
from runner.data.corrections.model import Correction
from runner.data.corrections.pictures import picture_png
from runner.data.sources.archive import READ_ERRORS, Archive
from runner.data.sources.media_reader import IN_MEMORY, hashed
from runner.data.sources.model import SourceMedia
from runner.data.sources.open_archive import open_archive
from runner.data.sources.scan import workers
from runner.storage.bulk_writer import BulkWriter, CacheNotWritable


def unpack(
    media: Sequence[tuple[SourceMedia, Correction]],
    writer: BulkWriter,
    progress: Callable[[int], None],
) -> None:
    """Write media into the shared cache, corrected, several at once; existing entries are kept.

    Args:
        media: the media to write, and their corrections.
        writer: writes to the cache.
        progress: called with the number of media that are done.

    Raises:
        UserError: a source has changed since the scan, or can't be read.
    """
    stop = threading.Event()

    def extract(one: tuple[SourceMedia, Correction]) -> None:
        item, correction = one
        key = item.cache_key(correction)
        if stop.is_set() or not writer.reserve(key):
            return
        digests: list[str] = []
        file = writer.write(
            lambda write: digests.append(_copy(item, correction, archives, write, stop))
        )
        writer.add(file, key, item.cache_inputs(correction), digests[0])

    with _archives(item for item, _ in media) as archives:
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
    correction: Correction,
    archives: dict[Path, Archive],
    write: Callable[[bytes], object],
    stop: threading.Event,
) -> str:
    """Pass the media, corrected, to ``write``; return the SHA-256 of what was passed."""
    if not correction:
        with _open_media(item, archives) as source:
            _check(item, hashed(source, write, stop)[0])
        return item.sha256
    digest = hashlib.sha256()

    def hash_and_write(data: bytes) -> None:
        if stop.is_set():
            raise CancelledError
        digest.update(data)
        write(data)

    with cast(BinaryIO, SpooledTemporaryFile(IN_MEMORY)) as held:
        with _open_media(item, archives) as source:
            _check(item, hashed(source, held.write, stop)[0])
        held.seek(0)
        try:
            if item.media_kind == "image":
                hash_and_write(picture_png(held, correction))
            else:
                write_clip(held, correction, hash_and_write)
        except (CacheNotWritable, CancelledError):
            raise
        except Exception as error:
            # Decoders raise all kinds of errors; what could be read before has changed since.
            raise UserError(f"{item.name} can't be corrected: {error}") from error
    return digest.hexdigest()


@contextmanager
def _archives(media: Iterable[SourceMedia]) -> Iterator[dict[Path, Archive]]:
    """Open each archive of the media once, since opening a large one takes a while."""
    with ExitStack() as stack:
        paths = dict.fromkeys(item.archive for item in media if item.archive is not None)
        yield {path: stack.enter_context(open_archive(path)) for path in paths}


@contextmanager
def _open_media(item: SourceMedia, archives: dict[Path, Archive]) -> Iterator[BinaryIO]:
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
            yield member
    except READ_ERRORS as error:
        raise UserError(f"{item.name} in {item.archive} can't be read: {error}") from None
