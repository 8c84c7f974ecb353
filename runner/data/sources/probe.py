"""Probe the properties of a picture or clip, decoding as little as possible.

PIL and PyAV are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from runner.core.errors import UserError
from runner.core.text import counted
from runner.data.corrections.clips import clip_stream, frame_display, open_clip
from runner.data.corrections.model import (
    Display,
    square_size,
    turned_size,
    uneven_times,
)
from runner.data.corrections.pictures import (
    load_picture,
    open_picture,
    picture_display,
    shrink_factor,
)
from runner.formats.bucket import Size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_EOI = b"\xff\xd9"
# Bytes of a JPEG that contain its headers and more than 16 lines.
_HEAD = 256 << 10
# A clip that has fewer of the frames that its header states is named.
_LEFT = 0.9

# Increase when probing may give another result for the same file.
PROBE_VERSION = 2


@dataclass(frozen=True)
class Properties:
    """The properties of a media file.

    Attributes:
        size: width and height in pixels, as displayed.
        frames: number of frames that can be decoded, 1 for a picture.
        fps: frames per second of a clip, by its time stamps; None if it has none.
        mode: PIL's mode of a picture.
        display: how it is displayed.
    """

    size: Size
    frames: int
    fps: float | None
    mode: str | None
    display: Display


def probe_picture(stream: BinaryIO) -> Properties:
    """Probe a picture; the decoder's error is raised if it is damaged."""
    with open_picture(stream) as image:
        shrink = shrink_factor(image.size)
        # A file that is cut short opens, and fails only when the pixels are read.
        if image.format in ("JPEG", "MPO") and _jpeg_is_whole(stream):
            display = picture_display(image, shrink)
            width, height = (-(-side // shrink) for side in image.size)
        else:
            loaded = load_picture(image, shrink)
            display = picture_display(loaded, shrink)
            width, height = loaded.size
        size = turned_size((width, height), display.orientation)
        return Properties(size, 1, None, image.mode, display)


def _jpeg_is_whole(stream: BinaryIO) -> bool:
    """Whether a JPEG has readable headers, and its end marker at the end of the file.

    Damage in between cannot make the decoder fail: any bits decode to some picture.
    """
    place = stream.tell()
    stream.seek(0)
    head = bytearray(stream.read(_HEAD))
    stream.seek(-min(len(head), 2), os.SEEK_END)
    end = stream.read()
    stream.seek(place)
    return end == _EOI and _jpeg_head_decodes(head)


def _jpeg_head_decodes(head: bytearray) -> bool:
    """Whether the first lines of a JPEG can be decoded: they need all of its tables."""
    from PIL import Image

    at, lines = 2, 0
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            lines = int.from_bytes(head[at + 5 : at + 7], "big")
            head[at + 5 : at + 7] = min(lines, 16).to_bytes(2, "big")
        if marker == 0xDA:
            break
        at += 2 + length
    else:
        return False
    if not lines:
        return False
    try:
        with Image.open(io.BytesIO(bytes(head) + _EOI)) as image:
            image.load()
    except Exception:  # The caller then decodes all of it, and reports the error.
        return False
    return True


def probe_clip(source: Path | BinaryIO) -> Properties:
    """Probe a clip; the decoder's error is raised if it is damaged.

    Containers state wrong counts and hide damage, so frames are counted by decoding all of them,
    except where the packets alone leave no doubt.

    Raises:
        UserError: it has no frame.
    """
    properties = _probe(source, _count_packets)
    return properties if properties is not None else _decoded(source)


def _decoded(source: Path | BinaryIO) -> Properties:
    """Probe a clip by decoding every frame."""
    properties = _probe(source, _count_decoded)
    if properties is None:
        raise UserError("it has no frame")
    return properties


# A clip's first frame, and the times of all in seconds; None if in doubt, or if there is none.
_Frames = tuple["VideoFrame", list[float]]


def _probe(
    source: Path | BinaryIO, count: Callable[[InputContainer, VideoStream], _Frames | None]
) -> Properties | None:
    with open_clip(source) as container:
        stream = clip_stream(container)
        counted = count(container, stream)
        if counted is None:
            return None
        first, times = counted
        tick = float(stream.time_base or 0)
        frames, fps = len(times), _rate(times, tick, stream.average_rate or stream.guessed_rate)
        stated = _frames_stated(container, stream, min(times), fps)
        display = replace(
            frame_display(first, stream),
            times=uneven_times(times),
            frames_stated=stated if stated is not None and frames < _LEFT * stated else None,
        )
        stored = (first.width, first.height)
    size = turned_size(square_size(stored, display.pixel_aspect), display.orientation)
    if size == turned_size(stored, display.orientation):
        display = replace(display, pixel_aspect=(1, 1))
    return Properties(size, frames, fps, None, display)


def _rate(times: list[float], tick: float, stated: Fraction | None) -> float | None:
    """Return the frames per second by the time stamps; the stated rate if they can't tell it apart.

    Stamps are rounded to a ``tick``, in seconds: Matroska's to 1 ms.
    """
    seconds = max(times) - min(times)
    if seconds <= 0:
        return float(stated) if stated else None
    fps = (len(times) - 1) / seconds
    return float(stated) if stated and abs(1 - fps / stated) <= 2 * tick / seconds else fps


def _frames_stated(
    container: InputContainer, stream: VideoStream, first: float, fps: float | None
) -> int | None:
    """Return the number of frames that fit into the duration that the header states.

    Args:
        container: the clip.
        stream: its pictures.
        first: the time of its first frame in seconds.
        fps: its frames per second.
    """
    if fps is None:
        return None
    if stream.duration and stream.time_base:
        return round(float(stream.duration * stream.time_base) * fps)
    end = stream.metadata.get("DURATION", "")  # Matroska: the time at which the stream ends
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", end):
        hours, minutes, seconds = map(float, match.groups())
        return round((hours * 3600 + minutes * 60 + seconds - max(0.0, first)) * fps)
    # The container's end is that of its longest stream.
    if container.duration and len(container.streams) == 1:
        return round((container.duration / 1_000_000 - max(0.0, first)) * fps)
    return None


def _count_decoded(container: InputContainer, stream: VideoStream) -> _Frames | None:
    stream.thread_type = "AUTO"
    # Several clips are probed at once, and each thread holds frames of its own.
    stream.codec_context.thread_count = 2
    import av

    first: VideoFrame | None = None
    times: list[float] = []
    try:
        for frame in container.decode(stream):
            first = first or frame
            times.append(frame.time if frame.time is not None else float(len(times)))
    except av.FFmpegError as error:
        if first is None:
            raise
        raise UserError(
            f"it is damaged or cut short after {counted(len(times), 'frame')} ({error.strerror})"
        ) from None
    return None if first is None else (first, times)


def _count_packets(container: InputContainer, stream: VideoStream) -> _Frames | None:
    """Count the frames of H.264 and HEVC in MP4, MOV and MKV, where one packet is one frame.

    Returns:
        The first frame and the times. None if in doubt: packets are damaged, empty or missing, are
        decoded but not shown (edit lists), are shown before the first key frame, or may contain
        half a frame (interlaced).
    """
    length_size = _nal_length_size(container, stream)
    if length_size is None or stream.time_base is None:
        return None
    stream.codec_context.thread_count = 1
    shown: VideoFrame | None = None
    times: list[int] = []
    ended = False
    for packet in container.demux(stream):
        if packet.size == 0:  # The last one is, to drain the decoder.
            ended = True
            continue
        if ended or packet.is_corrupt or packet.is_discard or packet.pts is None:
            return None
        if not times and not packet.is_keyframe:
            return None
        times.append(packet.pts)
        if packet.pts < times[0] or not _nals_fit(memoryview(packet), length_size):
            return None
        if shown is None:
            shown = next(iter(packet.decode()), None)  # type: ignore[assignment]
            if shown is not None and shown.interlaced_frame:
                return None
    if shown is None or not _even(times):
        return None
    return shown, [float(time * stream.time_base) for time in times]


def _nal_length_size(container: InputContainer, stream: VideoStream) -> int | None:
    """Return the bytes of the length before each unit of a packet; None for other formats."""
    extra = stream.codec_context.extradata or b""
    codec = stream.codec_context.name
    families = set(container.format.name.split(","))
    if not families & {"mp4", "matroska"} or not extra or extra[0] != 1:
        return None
    if codec == "h264" and len(extra) > 6:
        return (extra[4] & 3) + 1
    if codec == "hevc" and len(extra) > 22:
        return (extra[21] & 3) + 1
    return None


def _even(times: list[int]) -> bool:
    """Whether frames follow each other without a gap where one may be missing."""
    ordered = sorted(times)
    steps = sorted(later - earlier for earlier, later in pairwise(ordered))
    return not steps or (steps[0] > 0 and steps[-1] < 2 * steps[len(steps) // 2])


def _nals_fit(data: memoryview, length_size: int) -> bool:
    """Whether the stated lengths of a packet's units fill the packet; if damaged, they do not."""
    at, end = 0, len(data)
    while at < end:
        length = int.from_bytes(data[at : at + length_size], "big")
        at += length_size
        # The first bit of a unit is always 0, and no unit is empty.
        if length == 0 or at + length > end or data[at] & 0x80:
            return False
        at += length
    return at == end
