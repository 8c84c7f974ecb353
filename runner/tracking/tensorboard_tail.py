"""Scalars from TensorBoard event files, read while a trainer writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.tracking.metrics import Point

# TFRecord framing around each record: 8 bytes length, 4 bytes CRC, the record, 4 bytes CRC.
_FRAME_BYTES = 16

# TensorFlow's DataType numbers of float32, float64, int32, int64 and float16.
_NUMBER_TYPES = (1, 2, 3, 9, 19)


class _EventFile:
    """An event file, and the number of bytes of it that were read as complete records."""

    def __init__(self, path: Path) -> None:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

        self.path = path
        self.consumed = 0
        self._loader = RawEventFileLoader(str(path))

    def events(self) -> Iterator[Any]:
        """Yield new events; an incomplete record is yielded once it is complete."""
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto import event_pb2

        for record in self._loader.Load():
            self.consumed += len(record) + _FRAME_BYTES
            try:
                yield event_pb2.Event.FromString(record)
            except DecodeError:
                continue

    def unread(self) -> int:
        """Count the bytes after the last complete record."""
        try:
            return max(0, self.path.stat().st_size - self.consumed)
        except OSError:
            return 0


class TensorBoardTail:
    """A reader of the scalars in all event files below a folder; gives each point once."""

    def __init__(self, folder: Path) -> None:
        """``folder`` need not exist yet."""
        self._folder = folder
        self._files: dict[Path, _EventFile] = {}

    def read(self) -> list[Point]:
        """Return the points written since the last call, by file name, then in written order.

        Reads both forms of a scalar: the plain value that torch writes, and the tensor of one
        element that TensorFlow writes. An incomplete record waits until the rest is written.
        """
        for path in sorted(self._folder.rglob("events.out.tfevents.*")):
            if path not in self._files and path.is_file():
                self._files[path] = _EventFile(path)
        return [
            point
            for path in sorted(self._files)
            for event in self._files[path].events()
            for point in _scalars(event)
        ]

    def unread_bytes(self) -> int:
        """Count the bytes that :meth:`read` could not turn into records.

        Call it after the writer ended and a last :meth:`read`: more than 0 means a corrupt or
        incomplete record, which hides everything behind it in that file.
        """
        return sum(file.unread() for file in self._files.values())


def _scalars(event: Any) -> Iterator[Point]:
    from tensorboard.util import tensor_util

    if not event.HasField("summary"):
        return
    timestamp = max(0, round(event.wall_time * 1000))
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            number = float(value.simple_value)
        elif kind == "tensor":
            # Texts, images and histograms are tensors too, of strings or of several elements.
            if value.tensor.dtype not in _NUMBER_TYPES:
                continue
            array = tensor_util.make_ndarray(value.tensor)
            if array.size != 1:
                continue
            number = float(array.reshape(()))
        else:
            continue
        yield Point(value.tag, number, int(event.step), timestamp)
