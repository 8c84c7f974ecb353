"""Read clips as a player shows them, and write corrected copies.

PyAV, numpy and PIL are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from runner.core.errors import UserError
from runner.data.corrections.model import Correction, Display, Transfer
from runner.data.corrections.tone_mapping import DEFAULT_PEAK, tone_map
from runner.formats.frames import MODEL_FPS

if TYPE_CHECKING:
    import numpy as np
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# EXIF's number by the signs of a display matrix: how x and y of a shown pixel come from the stored
# ones (FFmpeg's libavutil/display.h).
_ORIENTATIONS = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}
# FFmpeg's AVColorTransferCharacteristic.
_TRANSFERS: dict[int, Transfer] = {16: "pq", 18: "hlg"}


@contextmanager
def open_clip(source: Path | BinaryIO) -> Iterator[InputContainer]:
    """Open a clip for the length of the block; FFmpeg's error is raised if it is none."""
    import av

    if not isinstance(source, Path):
        source.seek(0)
    # "file:" keeps a name with a colon from being taken for a protocol.
    with av.open(f"file:{source}" if isinstance(source, Path) else source, "r") as container:
        yield container


def clip_stream(container: InputContainer) -> VideoStream:
    """Return the stream of moving pictures; a cover picture is none.

    Raises:
        UserError: there is none.
    """
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise UserError("it has no video stream")


def frame_display(frame: VideoFrame, stream: VideoStream) -> Display:
    """Return how a clip is displayed, as far as its first frame and its headers say."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    transfer = _TRANSFERS.get(int(frame.color_trc), "")
    videos = stream.container.streams.video
    return Display(
        orientation=_orientation(frame),
        transparent=_is_transparent(frame),
        stream=next(n for n, video in enumerate(videos) if video.index == stream.index),
        pixel_aspect=(aspect.numerator, aspect.denominator) if aspect > 0 else (1, 1),
        transfer=transfer,
        peak=_peak(frame) if transfer else 0.0,
        interlaced=bool(frame.interlaced_frame),
    )


def _side_data(frame: VideoFrame, kind: str) -> bytes | None:
    # PyAV's stubs know them as a mapping; iterating gives the data themselves.
    everything: Any = frame.side_data
    return next((bytes(data) for data in everything if data.type.name == kind), None)


def _orientation(frame: VideoFrame) -> int:
    data = _side_data(frame, "DISPLAYMATRIX")
    if data is None or len(data) < 36:
        return 1
    a, b, _, c, d = struct.unpack_from("=5i", data)
    largest = max(map(abs, (a, b, c, d)))
    # Rotations by other than right angles come to the nearest one.
    signs = tuple(round(value / largest) if largest else 0 for value in (a, b, c, d))
    return _ORIENTATIONS.get(cast(tuple[int, int, int, int], signs), 1)


def _is_transparent(frame: VideoFrame) -> bool:
    if not any(component.is_alpha for component in frame.format.components):
        return False
    return bool(frame.to_ndarray(format="rgba")[..., 3].min() < 255)


def _peak(frame: VideoFrame) -> float:
    """Return the brightest light that a clip states, in cd/m2, as FFmpeg's tonemap filter does."""
    light = _side_data(frame, "CONTENT_LIGHT_LEVEL")
    if light is not None and (maximum := struct.unpack_from("=I", light)[0]):
        return float(maximum)
    mastering = _side_data(frame, "MASTERING_DISPLAY_METADATA")
    if mastering is not None and len(mastering) >= 88:
        # Ten rationals of the primaries, then the lowest and the highest light, then two flags.
        numerator, denominator = struct.unpack_from("=2i", mastering, 72)
        if struct.unpack_from("=i", mastering, 84)[0] and numerator > 0 and denominator > 0:
            return float(numerator / denominator)
    return DEFAULT_PEAK


def corrected_frame(frame: VideoFrame, correction: Correction) -> np.ndarray:
    """Return a frame with its clip's correction.

    Returns:
        [H, W, 3] uint8, RGB.
    """
    import numpy as np
    from PIL import Image

    if correction.transfer:
        image = tone_map(frame.to_ndarray(format="rgb48le"), correction.transfer, correction.peak)
    elif correction.background:
        rgba = Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA")
        blended = Image.new("RGB", rgba.size, correction.background)
        blended.paste(rgba, mask=rgba)
        image = np.array(blended)
    else:
        image = frame.to_ndarray(format="rgb24")
    if correction.size is not None:
        resized = Image.fromarray(image).resize(correction.size, Image.Resampling.LANCZOS)
        image = np.array(resized)
    return _turned(image, correction.orientation)


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror [H, W, 3] as EXIF's ``orientation`` says."""
    import numpy as np

    # First mirrored or not, then turned by quarters of a circle to the left.
    mirrored, quarters = {
        1: (False, 0),
        2: (True, 0),
        3: (False, 2),
        4: (True, 2),
        5: (True, 1),
        6: (False, 3),
        7: (True, 3),
        8: (False, 1),
    }[orientation]
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if mirrored else image, quarters))


def corrected_frames(source: Path | BinaryIO, correction: Correction) -> Iterator[np.ndarray]:
    """Yield the frames of the corrected copy of a clip, [H, W, 3] uint8 RGB each.

    Raises:
        UserError: the clip has fewer frames than when it was scanned.
        av.FFmpegError: it is damaged.
    """
    wanted = iter(correction.frames)
    index = next(wanted, None)
    with open_clip(source) as container:
        stream = container.streams.video[correction.stream]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if index is None:
                return
            if number != index:
                continue
            image = corrected_frame(frame, correction)
            # A stored frame can be shown several times.
            while index == number:
                yield image
                index = next(wanted, None)
    if index is not None:
        raise UserError(f"its frame {index} can't be decoded")


class _Sink:
    """A file that PyAV can write to, but not seek in."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        """Write bytes, and return their number."""
        self._write(data)
        return len(data)


def write_clip(
    source: Path | BinaryIO, correction: Correction, write: Callable[[bytes], object]
) -> None:
    """Write the corrected copy of a clip: FFV1 in Matroska, RGB, without loss.

    Args:
        source: the clip.
        correction: its correction.
        write: called with the bytes of the copy, in order.

    Raises:
        UserError: the clip has fewer frames than when it was scanned.
        av.FFmpegError: it is damaged.
    """
    import av

    rate = Fraction(correction.rate or MODEL_FPS).limit_denominator(1001)
    # bitexact leaves out what differs each time (random ids, versions).
    options = {"fflags": "+bitexact"}
    with av.open(_Sink(write), "w", format="matroska", options=options) as container:
        stream: VideoStream | None = None
        for number, image in enumerate(corrected_frames(source, correction)):
            if stream is None:
                stream = container.add_stream("ffv1", rate=rate)
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "bgr0"
                stream.options = {"level": "3", "slicecrc": "1"}
            frame = av.VideoFrame.from_ndarray(_fitted(image, stream), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())


def _fitted(image: np.ndarray, stream: VideoStream) -> np.ndarray:
    """Bring a frame to the size of the first one; some clips change it on the way."""
    import numpy as np
    from PIL import Image

    if image.shape[:2] == (stream.height, stream.width):
        return image
    return np.array(Image.fromarray(image).resize((stream.width, stream.height)))
