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

from runner.core.errors import UserError
from runner.core.file_identity import Identity, identity_of
from runner.core.holes import is_hollow
from runner.data.corrections.model import NO_CORRECTION, Correction
from runner.data.corrections.pictures import picture_png
from runner.data.sources.listing import ListedMedia
from runner.data.sources.model import SourceMedia
from runner.data.sources.probe import Properties, probe_clip, probe_picture
from runner.storage.bulk_writer import BulkWriter, CacheNotWritable, Write

CHUNK = 1 << 20
# A media file of an archive that is not extracted is held in memory up to this size, else in the
# temporary folder of the system.
IN_MEMORY = 16 << 20


@dataclass(frozen=True)
class ArchiveExtractor:
    """Extracts media of an archive into the cache while they are read.

    Attributes:
        writer: writes to the cache.
        wanted: returns the correction of media that the run uses, None for others.
    """

    writer: BulkWriter
    wanted: Callable[[SourceMedia], Correction | None]

    def takes(self, media: SourceMedia) -> Correction | None:
        """Return the correction with which the caller is to extract the media, else None.

        Clips to be corrected are left for later, since that takes long.
        """
        correction = self.wanted(media)
        if correction is None or (correction and media.media_kind == "video"):
            return None
        return correction if self.writer.reserve(media.cache_key(correction)) else None

    def write(self, media: SourceMedia, correction: Correction, data: bytes) -> None:
        """Commit media that are held in memory, or the corrected picture made from them."""
        content = picture_png(io.BytesIO(data), correction) if correction else data
        digest = hashlib.sha256(content).hexdigest() if correction else media.sha256
        self._add(media, correction, self.writer.write(lambda write: write(content)), digest)

    def add(self, media: SourceMedia, file: Path) -> None:
        """Commit media that were written to ``file``, and need no correction."""
        self._add(media, NO_CORRECTION, file, media.sha256)

    def _add(self, media: SourceMedia, correction: Correction, file: Path, digest: str) -> None:
        key, inputs = media.cache_key(correction), media.cache_inputs(correction)
        self.writer.add(file, key, inputs, digest)


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
        try:
            if listed.file is not None and not listed.file.is_file():
                return "can't be read: it is a broken link or not a regular file", began
            return self._read(listed), began
        except (CacheNotWritable, CancelledError):
            raise
        except Exception as error:
            # Decoders raise all kinds of errors on damaged data; one bad file must not end a scan.
            if listed.file is not None and not listed.file.stat().st_size:
                return "can't be read: it is empty", began
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
            properties = probe_picture(io.BytesIO(data))
        else:
            if is_hollow(stream.fileno()):
                raise UserError("more than half of it was never written: get the file again")
            # Before hashing: a file of any size can call itself a clip.
            properties = _probe_file(listed, listed.file)
            stream.seek(0)
            digest, length = hashed(stream, None, self.stop)
        return _make_media(listed, digest, length, properties, before)

    def _of_small_member(self, listed: ListedMedia, stream: BinaryIO) -> SourceMedia:
        data = stream.read()
        properties = probe_picture(io.BytesIO(data))
        digest = hashlib.sha256(data).hexdigest()
        media = _make_media(listed, digest, len(data), properties, self.archive)
        if self.extractor is not None:
            correction = self.extractor.takes(media)
            if correction is not None:
                self.extractor.write(media, correction, data)
        return media

    def _of_member(self, listed: ListedMedia, stream: BinaryIO) -> SourceMedia:
        with cast(BinaryIO, SpooledTemporaryFile(IN_MEMORY)) as held:
            digest, length = hashed(stream, held.write, self.stop)
            held.seek(0)
            properties = _probe(listed, held)
            return _make_media(listed, digest, length, properties, self.archive)

    def _of_kept_member(
        self, listed: ListedMedia, stream: BinaryIO, extractor: ArchiveExtractor
    ) -> SourceMedia:
        hashes: list[tuple[str, int]] = []
        file = extractor.writer.write(lambda write: hashes.append(hashed(stream, write, self.stop)))
        try:
            properties = _probe_file(listed, file)
            media = _make_media(listed, *hashes[0], properties, self.archive)
            correction = extractor.takes(media)
            if correction is not None:
                if not correction:
                    extractor.add(media, file)
                    return media
                extractor.write(media, correction, file.read_bytes())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        file.unlink()
        return media


def _probe(listed: ListedMedia, stream: BinaryIO) -> Properties:
    return probe_picture(stream) if listed.media_kind == "image" else probe_clip(stream)


def _probe_file(listed: ListedMedia, file: Path) -> Properties:
    if listed.media_kind == "video":
        return probe_clip(file)
    with file.open("rb") as stream:
        return probe_picture(stream)


def _make_media(
    listed: ListedMedia,
    digest: str,
    length: int,
    properties: Properties,
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
        display=properties.display,
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
