"""Pixels of pictures and clips, decoded and resized as musubi-tuner v0.3.4 does it.

PIL, OpenCV and PyAV are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from runner.core.errors import UserError
from runner.formats.bucket import Size, bucket_size
from runner.formats.frames import FrameExtraction, choose

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def resize_to_bucket(image: np.ndarray, size: Size) -> np.ndarray:
    """Scale a picture until it covers `size`, then cut the middle out.

    image: [H, W, 3] uint8, RGB; the result has `size` (width, height in pixels), same layout.
    Lanczos (PIL) when it grows, area averaging (OpenCV) when it shrinks: musubi's choice, and so
    its pixels.
    """
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    scale = max(size[0] / width, size[1] / height)
    width, height = int(width * scale + 0.5), int(height * scale + 0.5)
    if scale > 1:
        import numpy as np
        from PIL import Image

        grown = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        image = np.array(grown)
    else:
        import cv2

        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return image[top : top + size[1], left : left + size[0]]


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; an alpha channel is dropped, not blended.

    musubi converts every mode so except RGBA, on which it crashes.
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: Path | str | BinaryIO) -> np.ndarray:
    """A picture as [H, W, 3] uint8, RGB, as stored: no EXIF rotation, the first frame if animated.

    Raises UserError when it can't be read.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(to_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{_name(path)} can't be read as a picture: {error}") from None


def load_clip(path: Path | str, extraction: FrameExtraction, resolution: Size) -> np.ndarray:
    """The kept frames of a clip in its bucket: [F, H, W, 3] uint8, RGB.

    Decoding stops after the last frame that a crop can need; `crops(F, extraction)` then cuts.
    The bucket follows the first frame's size, and musubi's bucket flags don't apply to clips.

    Raises UserError when the clip can't be decoded or holds no frame.
    """
    import av
    import numpy as np

    frames: list[np.ndarray] = []
    size: Size | None = None
    try:
        # "file:" keeps a name with a colon from being taken for a protocol.
        with av.open(f"file:{path}", "r") as container:
            if not container.streams.video:
                raise UserError(f"{path} can't be decoded as a clip: it has no video stream")
            container.streams.video[0].thread_type = "AUTO"
            # `choose` comes first in zip, so that no frame beyond its end is decoded.
            chosen = zip(choose(extraction), container.decode(video=0), strict=False)
            for keep, frame in chosen:
                if not keep:
                    continue
                size = size or bucket_size((frame.width, frame.height), resolution)
                frames.append(resize_to_bucket(frame.to_ndarray(format="rgb24"), size))
    except av.FFmpegError as error:
        raise UserError(f"{path} can't be decoded as a clip: {error}") from None
    if not frames:
        raise UserError(f"{path} holds no frame that can be decoded")
    return np.stack(frames)


def _name(path: Path | str | BinaryIO) -> str:
    return str(path) if isinstance(path, str | Path) else str(getattr(path, "name", "the picture"))
