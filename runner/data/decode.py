"""Decode and resize pictures and clips as musubi-tuner v0.3.4 does.

PIL, OpenCV and PyAV are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from runner.core.errors import UserError
from runner.data.corrections.pictures import to_rgb
from runner.formats.bucket import Size, bucket_size
from runner.formats.frames import FrameExtraction, choose

if TYPE_CHECKING:
    import numpy as np


def resize_to_bucket(image: np.ndarray, size: Size) -> np.ndarray:
    """Scale a picture until it covers ``size``, then crop its centre.

    Enlarging uses Lanczos (PIL), shrinking area averaging (OpenCV), as in musubi-tuner, so that the
    pixels are the same.

    Args:
        image: [H, W, 3] uint8, RGB.
        size: width and height in pixels.

    Returns:
        The picture of that size, in the same layout.
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


def load_image(path: Path | str | BinaryIO) -> np.ndarray:
    """Load a picture as stored: without EXIF rotation, the first frame if animated.

    Returns:
        [H, W, 3] uint8, RGB.

    Raises:
        UserError: it can't be read.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(to_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{_name(path)} can't be read as a picture: {error}") from None


def load_clip(path: Path | str, extraction: FrameExtraction, resolution: Size) -> np.ndarray:
    """Load the kept frames of a clip, resized to its bucket.

    Decoding stops after the last frame that a crop can need; ``crops(F, extraction)`` gives the
    crops. The bucket depends on the size of the first frame; musubi-tuner's bucket flags don't
    apply to clips.

    Returns:
        [F, H, W, 3] uint8, RGB.

    Raises:
        UserError: the clip can't be decoded or has no frame.
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
            # `choose` comes first in zip, so that no frame after its end is decoded.
            chosen = zip(choose(extraction), container.decode(video=0), strict=False)
            for keep, frame in chosen:
                if not keep:
                    continue
                size = size or bucket_size((frame.width, frame.height), resolution)
                frames.append(resize_to_bucket(frame.to_ndarray(format="rgb24"), size))
    except av.FFmpegError as error:
        raise UserError(f"{path} can't be decoded as a clip: {error}") from None
    if not frames:
        raise UserError(f"{path} has no frame that can be decoded")
    return np.stack(frames)


def _name(path: Path | str | BinaryIO) -> str:
    return str(path) if isinstance(path, str | Path) else str(getattr(path, "name", "the picture"))
