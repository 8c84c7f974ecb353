"""Clips and colour profiles as phones, cameras and editors make them, generated and tiny."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from media_factory import frame_colour, frame_number

# What x and y of a shown pixel are of the stored ones, as FFmpeg's display matrix has it, for each
# of EXIF's orientations.
_MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
# The rates that people's clips have, and three that vary.
TIMES: dict[str, list[float]] = {
    "24": [n / 24 for n in range(30)],
    "16": [n / 16 for n in range(20)],
    "25": [n / 25 for n in range(50)],
    "29.97": [n * 1001 / 30000 for n in range(60)],
    "50": [n / 50 for n in range(40)],
    "60": [n / 60 for n in range(60)],
    "phone": list(accumulate([1 / 30] * 20 + [1 / 60] * 20 + [1 / 40] * 10, initial=0.0)),
    "uneven": list(accumulate((0.02 + 0.025 * (n * 7 % 10) / 10 for n in range(60)), initial=0.0)),
    "pause": list(accumulate([1 / 29] * 10 + [0.2] * 6 + [1 / 14] * 8, initial=0.0)),
}
CORNERS = np.array([[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (240, 240, 20)]], np.uint8)


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """A frame [H, W, 3] with a colour in each corner, and in the middle its number's."""
    width, height = size
    image = CORNERS.repeat(height // 2, 0).repeat(width // 2, 1)
    image[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = frame_colour(number)
    return image


def number_of(image: np.ndarray) -> int:
    """The number of a frame that :func:`picture` made, however it is turned."""
    height, width = image.shape[:2]
    middle = image[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8]
    return frame_number(middle)


def corners_of(image: np.ndarray) -> list[list[int]]:
    """The colours of the four corners, row by row."""
    return [[int(c) for c in image[y, x]] for y in (2, -3) for x in (2, -3)]


def odd_clip(
    path: Path,
    times: Sequence[float] = tuple(TIMES["24"][:6]),
    *,
    size: tuple[int, int] = (64, 48),
    orientation: int = 1,
    aspect: Fraction = Fraction(1),
    transfer: str = "",
    peak: int | None = None,
    interlaced: bool = False,
) -> Path:
    """Write a clip with what players need to show it right; nearly lossless."""
    import av

    base = Fraction(1, 1000 if path.suffix == ".mkv" else 90000)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx265" if transfer else "libx264", rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p10le" if transfer else "yuv444p"
        stream.time_base = stream.codec_context.time_base = base
        stream.codec_context.sample_aspect_ratio = aspect
        stream.options = {"qp": "0", "bf": "0"}
        if interlaced:
            stream.options |= {"flags": "+ildct+ilme", "x264-params": "tff=1"}
            stream.pix_fmt = "yuv420p"
        if transfer:
            light = f":max-cll={peak},{peak // 2}" if peak else ""
            stream.options = {"x265-params": f"log-level=none:lossless=1{light}"}
            stream.codec_context.color_primaries = 9
            stream.codec_context.color_trc = {"pq": 16, "hlg": 18}[transfer]
            stream.codec_context.colorspace = 9
            stream.codec_context.color_range = 1
        if orientation != 1:
            a, b, c, d = (value << 16 for value in _MATRICES[orientation])
            stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        for number, time in enumerate(times):
            image = hdr_picture(size) if transfer else picture(number, size)
            frame = av.VideoFrame.from_ndarray(image, format="rgb48le" if transfer else "rgb24")
            if transfer:
                frame = frame.reformat(
                    format="yuv444p10le", dst_colorspace=9, dst_color_range=1, src_color_range=2
                )
                frame.color_trc, frame.color_primaries = {"pq": 16, "hlg": 18}[transfer], 9
            frame.pts, frame.time_base = round(time / base), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def hdr_picture(size: tuple[int, int]) -> np.ndarray:
    """A picture [H, W, 3] uint16: steps of grey, and of pure and mixed colours."""
    width, height = size
    steps = np.linspace(0, 0.9 * 65535, 8).astype(np.uint16).repeat(-(-width // 8))[:width]
    rows = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0.7, 0.5), (0.4, 0.6, 1)]
    image = np.stack([steps[:, None] * np.array(row) for row in rows]).astype(np.uint16)
    return image.repeat(-(-height // 6), 0)[:height]


def wide_profile() -> bytes:
    """A colour profile with the primaries of Display P3 (adapted to D50) and the curve of sRGB."""
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    (count,) = struct.unpack_from(">I", profile, 128)
    for number in range(count):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if tag in primaries:
            values = (round(value * 65536) for value in primaries[tag])
            struct.pack_into(">3i", profile, offset + 8, *values)
    return bytes(profile)


def saved(image: Any, kind: str, **options: Any) -> bytes:
    """A picture as the bytes of a file of that kind."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
