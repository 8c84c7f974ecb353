"""Read one media file: its properties, and for a real run a copy in the shared cache."""

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
# A media file of an archive that is not extracted is held in memory up to this size, else in the
# temporary folder of the system.
IN_MEMORY = 16 << 20


@dataclass(frozen=True)
class ArchiveExtractor:
    """Extracts media of an archive into the cache while they are read, if ``wanted`` says so."""

    writer: BulkWriter
    wanted: Callable[[SourceMedia], bool]

    def takes(self, media: SourceMedia) -> bool:
        """Return whether the caller is to extract the media."""
        return self.wanted(media) and self.writer.reserve(media.cache_key)

    def write(self, media: SourceMedia, data: bytes) -> None:
        """Commit media that are held in memory, or the RGB picture made from them."""
        content = rgb_png(io.BytesIO(data)) if media.as_rgb else data
        digest = hashlib.sha256(content).hexdigest() if media.as_rgb else media.sha256
        file = self.writer.write(lambda write: write(content))
        self.writer.add(file, media.cache_key, media.cache_inputs, digest)

    def add(self, media: SourceMedia, file: Path) -> None:
        """Commit media that were written to ``file``."""
        self.writer.add(file, media.cache_key, media.cache_inputs, media.sha256)


@dataclass(frozen=True)
class MediaReader:
    """Reads listed media of one source; can be called from several threads.

    Attributes:
        extractor: extracts media of an archive, None to write nothing.
        archive: the identity of the archive, None for other sources.
        stop: set to cancel reading.
    """

    extractor: ArchiveExtractor | None
    archive: Identity | None
    stop: threading.Event

    def __call__(self, listed: ListedMedia) -> tuple[SourceMedia | str, int]:
        """Read one media file.

        Returns:
            Its properties or the reason why it is left out, and when reading began (nanoseconds).

        Raises:
            CacheNotWritable: the shared cache can't be written to.
        """
        began = time.time_ns()
        try:
            listed.name.encode()
        except UnicodeEncodeError:
            return "its file name is not UTF-8: rename it", began
        if listed.file is not None and not listed.file.is_file():
            return "can't be read: it is a broken link or not a regular file", began
        try:
            return self._read(listed), began
        except (CacheNotWritable, CancelledError):
            raise
        except Exception as error:
            # Decoders raise all kinds of errors on damaged data; one bad file must not end a scan.
            if type(error).__name__ == "UnidentifiedImageError":
                return "can't be read: it is not a picture", began
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            return f"can't be read: {reason}", began

    def _read(self, listed: ListedMedia) -> SourceMedia:
        with listed.open() as stream:
            if listed.file is not None:
                return self._of_file(listed, stream)
            if listed.media_kind == "image" and listed.size <= IN_MEMORY:
                return self._of_small_member(listed, stream)
            if self.extractor is None:
                return self._of_member(listed, stream)
            return self._of_kept_member(listed, stream, self.extractor)

    def _of_file(self, listed: ListedMedia, stream: BinaryIO) -> SourceMedia:
        assert listed.file is not None
        before = identity_of(os.fstat(stream.fileno()))
        if listed.media_kind == "image" and before[2] <= IN_MEMORY:
            data = stream.read()
            digest, length = hashlib.sha256(data).hexdigest(), len(data)
            properties = _image(io.BytesIO(data))
        else:
            digest, length = hashed(stream, None, self.stop)
            stream.seek(0)
            properties = _image(stream) if listed.media_kind == "image" else _video(listed.file)
        return _make_media(listed, digest, length, properties, before)

    def _of_small_member(self, listed: ListedMedia, stream: BinaryIO) -> SourceMedia:
        data = stream.read()
        properties = _image(io.BytesIO(data))
        digest = hashlib.sha256(data).hexdigest()
        media = _make_media(listed, digest, len(data), properties, self.archive)
        if self.extractor is not None and self.extractor.takes(media):
            self.extractor.write(media, data)
        return media

    def _of_member(self, listed: ListedMedia, stream: BinaryIO) -> SourceMedia:
        with cast(BinaryIO, SpooledTemporaryFile(IN_MEMORY)) as held:
            digest, length = hashed(stream, held.write, self.stop)
            held.seek(0)
            properties = _image(held) if listed.media_kind == "image" else _video(held)
            return _make_media(listed, digest, length, properties, self.archive)

    def _of_kept_member(
        self, listed: ListedMedia, stream: BinaryIO, extractor: ArchiveExtractor
    ) -> SourceMedia:
        hashes: list[tuple[str, int]] = []
        file = extractor.writer.write(lambda write: hashes.append(hashed(stream, write, self.stop)))
        try:
            properties = _image_in(file) if listed.media_kind == "image" else _video(file)
            media = _make_media(listed, *hashes[0], properties, self.archive)
            if extractor.takes(media):
                if not media.as_rgb:
                    extractor.add(media, file)
                    return media
                extractor.write(media, file.read_bytes())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        file.unlink()
        return media


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


def _make_media(
    listed: ListedMedia,
    digest: str,
    length: int,
    properties: _MediaProperties,
    identity: Identity | None,
) -> SourceMedia:
    return SourceMedia(
        name=listed.name,
        media_kind=listed.media_kind,
        sha256=digest,
        bytes=length,
        size=properties.size,
        frames=properties.frames,
        fps=properties.fps,
        mode=properties.mode,
        caption=listed.caption,
        file=listed.file,
        archive=listed.archive,
        member=listed.member,
        identity=identity,
    )


def hashed(
    source: BinaryIO,
    write: Write | Callable[[bytes], object] | None,
    stop: threading.Event | None = None,
) -> tuple[str, int]:
    """Read the rest of ``source``, pass it to ``write``, and return its SHA-256 and length."""
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
    """Convert a picture to an RGB PNG."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(stream) as image:
        # Compression is not worth the time here.
        to_rgb(image).save(out, "PNG", compress_level=1)
    return out.getvalue()
