"""Small pictures and clips made on the fly. Each frame of a clip tells its number by its colour."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from runner.data.corrections.model import Correction
    from runner.data.sources import SourceMedia

# Digits of base 8, one a channel, 32 levels apart: they survive lossy codecs and any resizing.
_BASE, _STEP = 8, 32

# Codec and pixel format for each container; mkv is lossless, RGB.
CODECS = {
    ".mp4": ("libx264", "yuv420p"),
    ".mov": ("libx264", "yuv420p"),
    ".mkv": ("ffv1", "bgr0"),
    ".avi": ("mpeg4", "yuv420p"),
    ".webm": ("libvpx", "yuv420p"),
    ".m4v": ("libx264", "yuv420p"),
    ".mpg": ("mpeg2video", "yuv420p"),
    ".mpeg": ("mpeg1video", "yuv420p"),
    ".ts": ("libx264", "yuv420p"),
    ".wmv": ("wmv2", "yuv420p"),
    ".3gp": ("mpeg4", "yuv420p"),
    ".flv": ("flv", "yuv420p"),
}


def frame_colour(number: int) -> tuple[int, int, int]:
    """The flat colour of frame `number` (0 to 511)."""
    assert 0 <= number < _BASE**3
    digits = (number // _BASE**2, number // _BASE % _BASE, number % _BASE)
    red, green, blue = (digit * _STEP + _STEP // 2 for digit in digits)
    return red, green, blue


def frame_number(frame: np.ndarray) -> int:
    """The number of a frame [H, W, 3] made by `make_clip`, however it was resized since."""
    red, green, blue = (int(value) // _STEP for value in frame.mean(axis=(0, 1)))
    return (red * _BASE + green) * _BASE + blue


def pattern(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A picture [H, W, 3] uint8 with detail at every scale; equal arguments, equal pixels."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red = (x * 255) // max(width - 1, 1)
    green = ((x // 5 + y // 7 + seed) % 2) * 160 + (y * 95) // max(height - 1, 1)
    blue = (x * x * 3 + y * 17 + x * y + seed * 29) % 256
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def make_image(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Path:
    """Write a picture; the format follows the extension, `mode` is PIL's."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pattern(size)).convert(mode)
    if path.suffix == ".png":
        image.save(path, compress_level=1)
    else:
        image.save(path)
    return path


def make_clip(
    path: Path,
    frames: int = 25,
    *,
    fps: float = 24.0,
    size: tuple[int, int] = (64, 48),
    pictures: Sequence[np.ndarray] | None = None,
    codec: str | None = None,
) -> Path:
    """Write a clip of numbered frames, or of `pictures`; the extension gives the codec if unset."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    if pictures is None:
        pictures = [
            np.full((size[1], size[0], 3), frame_colour(number), np.uint8)
            for number in range(frames)
        ]
    usual, pixels = CODECS[path.suffix]
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = cast("av.VideoStream", container.add_stream(codec or usual, rate=rate))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_sound(path: Path) -> Path:
    """Write a file of sound without a picture, in a container for clips."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def with_corrections(items: Sequence[SourceMedia]) -> list[tuple[SourceMedia, Correction]]:
    """Media with the corrections that the default options give them."""
    from runner.config.dataset_schema import DatasetConfig
    from runner.data.select import correction_of
    from runner.data.source_options import source_options

    (options,) = source_options(DatasetConfig())
    return [(item, correction_of(item, options, "t2v")) for item in items]


def key_of(item: SourceMedia) -> str:
    """The key of a medium, or of its corrected copy, in the shared cache."""
    ((_, correction),) = with_corrections([item])
    return item.cache_key(correction)
