"""One medium read: what it is, and where a run unpacks it, its bytes kept."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

from runner.core.file_identity import Identity, identity_of
from runner.data.decode import to_rgb
from runner.data.sources.listing import ListedMedia
from runner.data.sources.model import SourceMedia
from runner.data.sources.probe import probe_image, probe_video
from runner.formats.bucket import Size
from runner.storage.bulk_writer import BulkWriter, CacheNotWritable, Write

CHUNK = 1 << 20
# A medium of an archive that is not kept is held in memory up to this size, else in the temporary
# folder of the system; so are pictures in any case.
IN_MEMORY = 16 << 20


@dataclass(frozen=True)
class ArchiveExtractor:
    """Takes the media of an archive into the store as they are read, those that `wanted` likes."""

    writer: BulkWriter
    wanted: Callable[[SourceMedia], bool]

    def takes(self, item: SourceMedia) -> bool:
        return self.wanted(item) and self.writer.claim(item.cache_key)

    def write(self, item: SourceMedia, data: bytes) -> None:
        """Keep a medium that is held in memory, or the RGB picture made of it."""
        kept = rgb_png(io.BytesIO(data)) if item.as_rgb else data
        digest = hashlib.sha256(kept).hexdigest() if item.as_rgb else item.sha256
        file = self.writer.write(lambda write: write(kept))
        self.writer.add(file, item.cache_key, item.cache_inputs, digest)

    def add(self, item: SourceMedia, file: Path) -> None:
        """Keep a medium that was written to `file`."""
        self.writer.add(file, item.cache_key, item.cache_inputs, item.sha256)


@dataclass(frozen=True)
class MediaReader:
    """Looks at entries of one source, from several threads.

    archive: the identity of the archive they lie in, None for other sources. stop: set when nobody
    waits for an answer any more.
    """

    extractor: ArchiveExtractor | None
    archive: Identity | None
    stop: threading.Event

    def __call__(self, entry: ListedMedia) -> tuple[SourceMedia | str, int]:
        """The item, or why it is left out; and when the reading began.

        Raises CannotKeep when the store can't be written to.
        """
        began = time.time_ns()
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            return "its file name is not UTF-8: rename it", began
        if entry.file is not None and not entry.file.is_file():
            return "can't be read: it is a broken link or no regular file", began
        try:
            return self._item(entry), began
        except (CacheNotWritable, CancelledError):
            raise
        except Exception as error:
            # Decoders raise all kinds of errors on damaged data, and one bad file must not end a
            # scan.
            if type(error).__name__ == "UnidentifiedImageError":
                return "can't be read: it is no picture", began
            why = getattr(error, "strerror", None) or error or type(error).__name__
            return f"can't be read: {why}", began

    def _item(self, entry: ListedMedia) -> SourceMedia:
        with entry.open() as stream:
            if entry.file is not None:
                return self._of_file(entry, stream)
            if entry.media_kind == "image" and entry.size <= IN_MEMORY:
                return self._of_small_member(entry, stream)
            if self.extractor is None:
                return self._of_member(entry, stream)
            return self._of_kept_member(entry, stream, self.extractor)

    def _of_file(self, entry: ListedMedia, stream: BinaryIO) -> SourceMedia:
        assert entry.file is not None
        before = identity_of(os.fstat(stream.fileno()))
        if entry.media_kind == "image" and before[2] <= IN_MEMORY:
            data = stream.read()
            digest, length = hashlib.sha256(data).hexdigest(), len(data)
            properties = _image(io.BytesIO(data))
        else:
            digest, length = hashed(stream, None, self.stop)
            stream.seek(0)
            properties = _image(stream) if entry.media_kind == "image" else _video(entry.file)
        return _made(entry, digest, length, properties, before)

    def _of_small_member(self, entry: ListedMedia, stream: BinaryIO) -> SourceMedia:
        data = stream.read()
        properties = _image(io.BytesIO(data))
        digest = hashlib.sha256(data).hexdigest()
        item = _made(entry, digest, len(data), properties, self.archive)
        if self.extractor is not None and self.extractor.takes(item):
            self.extractor.write(item, data)
        return item

    def _of_member(self, entry: ListedMedia, stream: BinaryIO) -> SourceMedia:
        with cast(BinaryIO, SpooledTemporaryFile(IN_MEMORY)) as held:
            digest, length = hashed(stream, held.write, self.stop)
            held.seek(0)
            properties = _image(held) if entry.media_kind == "image" else _video(held)
            return _made(entry, digest, length, properties, self.archive)

    def _of_kept_member(
        self, entry: ListedMedia, stream: BinaryIO, extractor: ArchiveExtractor
    ) -> SourceMedia:
        hashes: list[tuple[str, int]] = []
        file = extractor.writer.write(lambda write: hashes.append(hashed(stream, write, self.stop)))
        try:
            properties = _image_in(file) if entry.media_kind == "image" else _video(file)
            item = _made(entry, *hashes[0], properties, self.archive)
            if extractor.takes(item):
                if not item.as_rgb:
                    extractor.add(item, file)
                    return item
                extractor.write(item, file.read_bytes())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        file.unlink()
        return item


@dataclass(frozen=True)
class _MediaProperties:
    size: Size
    frames: int
    fps: float | None
    mode: str | None


def _image(stream: BinaryIO) -> _MediaProperties:
    size, mode = probe_image(stream)
    return _MediaProperties(size, 1, None, mode)


def _image_in(file: Path) -> _MediaProperties:
    with file.open("rb") as stream:
        return _image(stream)


def _video(source: Path | BinaryIO) -> _MediaProperties:
    size, frames, fps = probe_video(source)
    return _MediaProperties(size, frames, fps, None)


def _made(
    entry: ListedMedia,
    digest: str,
    length: int,
    properties: _MediaProperties,
    identity: Identity | None,
) -> SourceMedia:
    return SourceMedia(
        name=entry.name,
        media_kind=entry.media_kind,
        sha256=digest,
        bytes=length,
        size=properties.size,
        frames=properties.frames,
        fps=properties.fps,
        mode=properties.mode,
        caption=entry.caption,
        file=entry.file,
        archive=entry.archive,
        member=entry.member,
        identity=identity,
    )


def hashed(
    source: BinaryIO,
    write: Write | Callable[[bytes], object] | None,
    stop: threading.Event | None = None,
) -> tuple[str, int]:
    """Sha256 and number of bytes of what is left in `source`, each given to `write`."""
    digest, length = hashlib.sha256(), 0
    while data := source.read(CHUNK):
        if stop is not None and stop.is_set():
            raise CancelledError
        digest.update(data)
        length += len(data)
        if write is not None:
            write(data)
    return digest.hexdigest(), length


def rgb_png(stream: BinaryIO) -> bytes:
    """A picture as an RGB PNG."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(stream) as image:
        # Unpacked once and read soon: worth little time to make small.
        to_rgb(image).save(out, "PNG", compress_level=1)
    return out.getvalue()
