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
from runner.data.sources.entries import Entry
from runner.data.sources.model import Item
from runner.data.sources.probe import probe_image, probe_video
from runner.formats.bucket import Size
from runner.storage.bulk_writer import BulkWriter, CannotKeep, Write

CHUNK = 1 << 20
# A medium of an archive that is not kept is held in memory up to this size, else in the temporary
# folder of the system; so are pictures in any case.
IN_MEMORY = 16 << 20


@dataclass(frozen=True)
class Keeper:
    """Takes the media of an archive into the store as they are read, those that `wanted` likes."""

    writer: BulkWriter
    wanted: Callable[[Item], bool]

    def takes(self, item: Item) -> bool:
        return self.wanted(item) and self.writer.claim(item.entry)

    def write(self, item: Item, data: bytes) -> None:
        """Keep a medium that is held in memory, or the RGB picture made of it."""
        kept = rgb_png(io.BytesIO(data)) if item.as_rgb else data
        digest = hashlib.sha256(kept).hexdigest() if item.as_rgb else item.sha256
        file = self.writer.write(lambda write: write(kept))
        self.writer.add(file, item.entry, item.made_of, digest)

    def add(self, item: Item, file: Path) -> None:
        """Keep a medium that was written to `file`."""
        self.writer.add(file, item.entry, item.made_of, item.sha256)


@dataclass(frozen=True)
class Looker:
    """Looks at entries of one source, from several threads.

    archive: the identity of the archive they lie in, None for other sources. stop: set when nobody
    waits for an answer any more.
    """

    keeper: Keeper | None
    archive: Identity | None
    stop: threading.Event

    def __call__(self, entry: Entry) -> tuple[Item | str, int]:
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
        except (CannotKeep, CancelledError):
            raise
        except Exception as error:
            # Decoders raise all kinds of errors on damaged data, and one bad file must not end a
            # scan.
            if type(error).__name__ == "UnidentifiedImageError":
                return "can't be read: it is no picture", began
            why = getattr(error, "strerror", None) or error or type(error).__name__
            return f"can't be read: {why}", began

    def _item(self, entry: Entry) -> Item:
        with entry.open() as stream:
            if entry.file is not None:
                return self._of_file(entry, stream)
            if entry.kind == "image" and entry.size <= IN_MEMORY:
                return self._of_small_member(entry, stream)
            if self.keeper is None:
                return self._of_member(entry, stream)
            return self._of_kept_member(entry, stream, self.keeper)

    def _of_file(self, entry: Entry, stream: BinaryIO) -> Item:
        assert entry.file is not None
        before = identity_of(os.fstat(stream.fileno()))
        if entry.kind == "image" and before[2] <= IN_MEMORY:
            data = stream.read()
            digest, length = hashlib.sha256(data).hexdigest(), len(data)
            facts = _image(io.BytesIO(data))
        else:
            digest, length = hashed(stream, None, self.stop)
            stream.seek(0)
            facts = _image(stream) if entry.kind == "image" else _video(entry.file)
        return _made(entry, digest, length, facts, before)

    def _of_small_member(self, entry: Entry, stream: BinaryIO) -> Item:
        data = stream.read()
        facts = _image(io.BytesIO(data))
        digest = hashlib.sha256(data).hexdigest()
        item = _made(entry, digest, len(data), facts, self.archive)
        if self.keeper is not None and self.keeper.takes(item):
            self.keeper.write(item, data)
        return item

    def _of_member(self, entry: Entry, stream: BinaryIO) -> Item:
        with cast(BinaryIO, SpooledTemporaryFile(IN_MEMORY)) as held:
            digest, length = hashed(stream, held.write, self.stop)
            held.seek(0)
            facts = _image(held) if entry.kind == "image" else _video(held)
            return _made(entry, digest, length, facts, self.archive)

    def _of_kept_member(self, entry: Entry, stream: BinaryIO, keeper: Keeper) -> Item:
        told: list[tuple[str, int]] = []
        file = keeper.writer.write(lambda write: told.append(hashed(stream, write, self.stop)))
        try:
            facts = _image_in(file) if entry.kind == "image" else _video(file)
            item = _made(entry, *told[0], facts, self.archive)
            if keeper.takes(item):
                if not item.as_rgb:
                    keeper.add(item, file)
                    return item
                keeper.write(item, file.read_bytes())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        file.unlink()
        return item


@dataclass(frozen=True)
class _Facts:
    size: Size
    frames: int
    fps: float | None
    mode: str | None


def _image(stream: BinaryIO) -> _Facts:
    size, mode = probe_image(stream)
    return _Facts(size, 1, None, mode)


def _image_in(file: Path) -> _Facts:
    with file.open("rb") as stream:
        return _image(stream)


def _video(source: Path | BinaryIO) -> _Facts:
    size, frames, fps = probe_video(source)
    return _Facts(size, frames, fps, None)


def _made(entry: Entry, digest: str, length: int, facts: _Facts, identity: Identity | None) -> Item:
    return Item(
        name=entry.name,
        kind=entry.kind,
        sha256=digest,
        bytes=length,
        size=facts.size,
        frames=facts.frames,
        fps=facts.fps,
        mode=facts.mode,
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
