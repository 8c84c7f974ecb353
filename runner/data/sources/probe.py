"""Probe the properties of a picture or clip, decoding as little as possible.

PIL and PyAV are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from runner.core.errors import UserError
from runner.formats.bucket import Size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_Counter = Callable[["InputContainer", "VideoStream"], tuple[Size, int] | None]

_EOI = b"\xff\xd9"
# Bytes of a JPEG that contain its headers and more than 16 lines.
_HEAD = 256 << 10

# Increase when probing may give another result for the same file.
PROBE_VERSION = 1


def probe_image(stream: BinaryIO) -> tuple[Size, str]:
    """Probe a picture; the decoder's error is raised if it is damaged.

    Returns:
        Its size in pixels, as stored, and PIL's mode.
    """
    from PIL import Image

    with Image.open(stream) as image:
        size, mode = image.size, image.mode
        is_whole = {"JPEG": _jpeg_is_whole, "PNG": _png_is_whole}.get(image.format or "")
        # A file that is cut short opens, and fails only in load().
        if is_whole is None or not is_whole(stream):
            image.load()
    return size, mode


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


def _png_is_whole(stream: BinaryIO) -> bool:
    """Whether every chunk of a PNG up to its end matches its checksum."""
    place = stream.tell()
    stream.seek(8)
    try:
        while len(head := stream.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            body = stream.read(length + 4)
            if len(body) < length + 4:
                return False
            checksum = zlib.crc32(memoryview(body)[:length], zlib.crc32(head[4:]))
            if checksum != int.from_bytes(body[length:], "big"):
                return False
            if head[4:] == b"IEND":
                return True
        return False
    finally:
        stream.seek(place)


def probe_video(source: Path | BinaryIO) -> tuple[Size, int, float | None]:
    """Probe a clip; the decoder's error is raised if it is damaged.

    Containers state wrong counts and hide damage, so frames are counted by decoding all of them,
    except where the packets alone leave no doubt.

    Returns:
        Its size in pixels, the number of frames that can be decoded, and the frames per second, if
        stated.

    Raises:
        UserError: it has no frame.
    """
    properties = _probe(source, _count_packets)
    return properties if properties is not None else _decoded(source)


def _decoded(source: Path | BinaryIO) -> tuple[Size, int, float | None]:
    """Probe a clip by decoding every frame."""
    properties = _probe(source, _count_decoded)
    if properties is None:
        raise UserError("it has no frame")
    return properties


def _probe(source: Path | BinaryIO, count: _Counter) -> tuple[Size, int, float | None] | None:
    import av

    if not isinstance(source, Path):
        source.seek(0)
    # "file:" keeps a name with a colon from being taken for a protocol.
    with av.open(f"file:{source}" if isinstance(source, Path) else source, "r") as container:
        if not container.streams.video:
            raise UserError("it has no video stream")
        stream = container.streams.video[0]
        counted = count(container, stream)
        rate = stream.average_rate or stream.guessed_rate
    if counted is None:
        return None
    return counted[0], counted[1], float(rate) if rate else None


def _count_decoded(container: InputContainer, stream: VideoStream) -> tuple[Size, int] | None:
    stream.thread_type = "AUTO"
    # Several clips are probed at once, and each thread holds frames of its own.
    stream.codec_context.thread_count = 2
    size, frames = None, 0
    for frame in container.decode(stream):
        size = size or (frame.width, frame.height)
        frames += 1
    return None if size is None else (size, frames)


def _count_packets(container: InputContainer, stream: VideoStream) -> tuple[Size, int] | None:
    """Count the frames of H.264 and HEVC in MP4, MOV and MKV, where one packet is one frame.

    Returns:
        Size and number of frames. None if in doubt: packets are damaged, empty or missing, are
        decoded but not shown (edit lists), are shown before the first key frame, or may contain
        half a frame (interlaced).
    """
    length_size = _nal_length_size(container, stream)
    if length_size is None:
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
    return (shown.width, shown.height), len(times)


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
