"""What a picture or clip is, without decoding more of it than is needed to be sure.

PIL and PyAV are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from runner.errors import UserError
from runner.formats.bucket import Size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_Counter = Callable[["InputContainer", "VideoStream"], tuple[Size, int] | None]

# Raised when the same file may be told otherwise than before.
PROBE_VERSION = 1


def probe_image(stream: BinaryIO) -> tuple[Size, str]:
    """Size (pixels, as stored) and PIL mode of a picture; the decoder's error if it is damaged."""
    from PIL import Image

    with Image.open(stream) as image:
        size, mode = image.size, image.mode
        if image.format in ("JPEG", "MPO"):
            # All of the file is read and a cut seen, but only an eighth of each side is computed.
            image.draft("L", (1, 1))
        # A file that is cut short opens, and fails only in load().
        if image.format != "PNG" or not _png_is_whole(stream):
            image.load()
    return size, mode


def _png_is_whole(stream: BinaryIO) -> bool:
    """Whether every chunk of a PNG has the checksum that it names, up to its end."""
    place = stream.tell()
    stream.seek(8)
    try:
        while len(head := stream.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            body = stream.read(length + 4)
            if len(body) < length + 4:
                return False
            found = zlib.crc32(memoryview(body)[:length], zlib.crc32(head[4:]))
            if found != int.from_bytes(body[length:], "big"):
                return False
            if head[4:] == b"IEND":
                return True
        return False
    finally:
        stream.seek(place)


def probe_video(source: Path | BinaryIO) -> tuple[Size, int, float | None]:
    """Size (pixels), decodable frames and frames a second, if stated, of a clip.

    Containers state wrong counts and hide damage, so that frames are counted by decoding all of
    them, except where the packets alone leave no doubt. Raises UserError when there is no frame,
    the decoder's error when the clip is damaged.
    """
    found = _probe(source, _count_packets)
    return found if found is not None else _decoded(source)


def _decoded(source: Path | BinaryIO) -> tuple[Size, int, float | None]:
    """`probe_video` by decoding every frame."""
    found = _probe(source, _count_decoded)
    if found is None:
        raise UserError("it holds no frame")
    return found


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
    """Size and frames of H.264 and HEVC in MP4, MOV and MKV, where a whole packet is one frame.

    None where that is in doubt: packets are cut or empty, to be decoded but not shown (edit
    lists), shown before the first that can be decoded, or may hold half a frame (interlaced).
    """
    length_size = _nal_length_size(container, stream)
    if length_size is None:
        return None
    stream.codec_context.thread_count = 1
    shown: VideoFrame | None = None
    first: int | None = None
    packets, ended = 0, False
    for packet in container.demux(stream):
        if packet.size == 0:  # The last one is, to drain the decoder.
            ended = True
            continue
        if ended or packet.is_corrupt or packet.is_discard or packet.pts is None:
            return None
        if first is None:
            if not packet.is_keyframe:
                return None
            first = packet.pts
        if packet.pts < first or not _nals_fit(memoryview(packet), length_size):
            return None
        packets += 1
        if shown is None:
            shown = next(iter(packet.decode()), None)  # type: ignore[assignment]
            if shown is not None and shown.interlaced_frame:
                return None
    return None if shown is None else ((shown.width, shown.height), packets)


def _nal_length_size(container: InputContainer, stream: VideoStream) -> int | None:
    """Bytes of the length before each unit of a packet, None for other formats."""
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


def _nals_fit(data: memoryview, length_size: int) -> bool:
    """Whether a packet is made of units of the lengths they name; damage shows here."""
    at, end = 0, len(data)
    while at < end:
        length = int.from_bytes(data[at : at + length_size], "big")
        at += length_size
        # The first bit of a unit is always 0, and no unit is empty.
        if length == 0 or at + length > end or data[at] & 0x80:
            return False
        at += length
    return at == end
