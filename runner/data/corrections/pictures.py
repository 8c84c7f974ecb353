"""Read pictures as a viewer shows them.

PIL and numpy are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
from typing import TYPE_CHECKING, BinaryIO

from runner.core.errors import UserError
from runner.data.corrections.model import Correction, Display
from runner.formats.bucket import Size
from runner.formats.media_types import PIL_FORMATS

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageCms

# Pictures with more pixels are read smaller: trainers refuse them, and they hold no more detail at
# the size of training. PIL warns above this number.
HUGE = 89_478_485
# Pixels of a picture that is read smaller.
_SHRUNK = 30_000_000
# With more pixels the memory of a small computer does not suffice.
MAX_PIXELS = 500_000_000

_ORIENTATION = 0x0112  # the EXIF tag
# The largest difference, of 255, of colours in a profile that counts as sRGB.
_SAME_COLOUR = 3
# How deep modes store white.
_WHITE = {"I;16": 65535.0, "I;16L": 65535.0, "I;16B": 65535.0, "I;16N": 65535.0}

_one_huge_picture = threading.Lock()


@contextmanager
def open_picture(stream: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture for the length of the block; its pixels are not read yet.

    Raises:
        UserError: it has too many pixels.
        Exception: the decoder's, if it is damaged or no picture.
    """
    from PIL import Image

    _prepare()
    with Image.open(stream, formats=PIL_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(
                f"it has {width * height / 1e6:.0f} megapixels, and {MAX_PIXELS / 1e6:.0f} is the "
                "limit: make it smaller"
            )
        # Huge pictures are read one after the other, for the memory that they need.
        with _one_huge_picture if width * height > HUGE else nullcontext():
            yield image


@cache
def _prepare() -> None:
    """Let PIL read HEIC, and speak of neither huge pictures nor odd metadata."""
    import pi_heif
    from PIL import Image

    # Loads the plugins; without them PIL does not know the names of PIL_FORMATS.
    Image.init()
    pi_heif.register_heif_opener()
    # A limit of PIL's own would refuse what is read smaller here.
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


def picture_display(image: Image.Image, shrink: int = 1) -> Display:
    """Return how a picture is displayed, of which the pixels are read or need not be.

    Args:
        image: the picture; of a JPEG the header is enough.
        shrink: the factor by which it was read smaller.
    """
    pictures = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    orientation = image.getexif().get(_ORIENTATION, 1)
    black, white = _levels(image)
    return Display(
        orientation=orientation if orientation in range(2, 9) else 1,
        transparent=_is_transparent(image),
        white=white,
        black=black,
        profile=_profile_name(image),
        shrink=shrink,
        pictures=pictures,
        heif=image.format == "HEIF",
    )


def corrected_picture(stream: BinaryIO, correction: Correction) -> Image.Image:
    """Read a picture with its correction; the decoder's error is raised if it is damaged.

    Returns:
        It in mode RGB.
    """
    with open_picture(stream) as image:
        return correct_picture(load_picture(image, correction.shrink), correction)


def correct_picture(image: Image.Image, correction: Correction) -> Image.Image:
    """Apply a correction to a picture that was read, whatever its size; the result is RGB."""
    from PIL import Image

    if correction.orientation != 1:
        image = _turned(image, correction.orientation)
    alpha = None
    if correction.background:
        image, alpha = _split_alpha(image)
    if correction.white is not None:
        image = _scaled(image, correction.black, correction.white)
    if correction.profile:
        image = _to_srgb(image)
    image = to_rgb(image)
    if alpha is not None:
        blended = Image.new("RGB", image.size, correction.background)
        blended.paste(image, mask=alpha)
        image = blended
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to mode RGB; an alpha channel is dropped, not blended.

    musubi-tuner converts every mode this way except RGBA, on which it crashes.
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def picture_png(stream: BinaryIO, correction: Correction) -> bytes:
    """Return a picture with its correction, as a PNG."""
    out = io.BytesIO()
    # Compression is not worth the time here.
    corrected_picture(stream, correction).save(out, "PNG", compress_level=1)
    return out.getvalue()


def shrink_factor(size: Size) -> int:
    """Return the factor by which a picture of so many pixels is read smaller, across and down."""
    pixels, factor = size[0] * size[1], 1
    if pixels > HUGE:
        while pixels / factor**2 > _SHRUNK:
            factor *= 2
    return factor


def load_picture(image: Image.Image, shrink: int) -> Image.Image:
    """Read the pixels, smaller by ``shrink`` across and down: in the decoder if the format can."""
    if shrink == 1:
        image.load()
        return image
    wanted = (-(-image.width // shrink), -(-image.height // shrink))
    image.draft(None, wanted)  # Decodes a JPEG at a half, a quarter or an eighth.
    image.load()
    factor = round(image.width / wanted[0])
    if factor == 1:
        return image
    smaller = image.reduce(factor)
    smaller.info, smaller.format = image.info, image.format  # type: ignore[misc]
    return smaller


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    turned = image.transpose(method)
    turned.info = image.info
    return turned


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    lowest, _ = _split_alpha(image)[1].getextrema()
    return isinstance(lowest, int) and lowest < 255


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return the colours of a picture, with its profile, and its alpha channel."""
    blended = image.convert("RGBA")
    grey = image.mode in ("L", "LA", "La", "1")
    colours = image.convert("LA").getchannel("L") if grey else blended.convert("RGB")
    colours.info = image.info
    return colours, blended.getchannel("A")


def _levels(image: Image.Image) -> tuple[float, float | None]:
    """Return the stored values that are shown as black and white, of modes beyond 8 bits.

    16-bit integers are white at the end of their range, 32-bit ones at 65535 or, if values exceed
    that, at the largest; a float picture at 1, 255 or 65535: at the lowest of them that no value
    exceeds, just above 1 at its largest value. Black is 0, or the lowest value if that is negative.
    """
    import numpy as np

    if image.mode in _WHITE:
        return 0.0, _WHITE[image.mode]
    if image.mode not in ("I", "F"):
        return 0.0, None
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    largest, lowest = (float(end(finite, initial=0)) for end in (np.max, np.min))
    if image.mode == "F" and 1 < largest <= 16:
        return lowest, largest
    ranges = (65535.0,) if image.mode == "I" else (1.0, 255.0, 65535.0)
    return lowest, next((white for white in ranges if largest <= white), largest)


def _scaled(image: Image.Image, black: float, white: float) -> Image.Image:
    import numpy as np
    from PIL import Image

    stored = np.asarray(image).astype(np.float32)
    values: np.ndarray = np.nan_to_num(stored, nan=black, posinf=white, neginf=black)
    share = np.clip((values - black) / (white - black), 0, 1)
    scaled = Image.fromarray((share * 255 + 0.5).astype(np.uint8))
    scaled.info = image.info
    return scaled


def _profile_name(image: Image.Image) -> str:
    """Return the name of the picture's colour profile if its colours differ from sRGB's."""
    from PIL import Image, ImageChops, ImageCms

    profiled = _colours(image)
    if profiled is None or (transform := _transform(profiled)) is None:
        return ""
    if profiled.mode in ("RGB", "L"):
        levels = bytes(range(0, 256, 15))
        if profiled.mode == "L":
            samples = Image.frombytes("L", (len(levels), 1), levels)
        else:
            every = ((r, g, b) for r in levels for g in levels for b in levels)
            colours = bytes(channel for colour in every for channel in colour)
            samples = Image.frombytes("RGB", (len(colours) // 3, 1), colours)
        converted = ImageCms.applyTransform(samples, transform)
        differences = ImageChops.difference(converted or samples, samples.convert("RGB"))
        if max(high for _, high in differences.getextrema()) <= _SAME_COLOUR:  # type: ignore[misc]
            return ""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profiled.info["icc_profile"]))
        name = ImageCms.getProfileDescription(profile).strip()
    except (OSError, ImageCms.PyCMSError):
        name = ""
    return name or "unnamed"


def _colours(image: Image.Image) -> Image.Image | None:
    """Return the picture in a mode that its colour profile is of; None without a profile."""
    if not image.info.get("icc_profile"):
        return None
    if image.mode in ("RGB", "CMYK", "LAB", "L"):
        return image
    grey = image.mode in ("1", "LA", "La", "I", "F") or image.mode.startswith("I;")
    colours = image.convert("L" if grey else "RGB")
    colours.info = image.info
    return colours


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of a picture by its profile; unchanged if it has no usable one."""
    from PIL import ImageCms

    profiled = _colours(image)
    transform = None if profiled is None else _transform(profiled)
    if profiled is None or transform is None:
        return image
    return ImageCms.applyTransform(profiled, transform) or image


def _transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from the picture's profile to sRGB; None if it has no usable one."""
    return _transform_of(image.info["icc_profile"], image.mode)


@lru_cache(16)
def _transform_of(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    from PIL import ImageCms

    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            # Several threads share a transform, and its cache of one pixel is not for that.
            flags=ImageCms.Flags.NOCACHE,
        )
    except (OSError, ImageCms.PyCMSError):
        return None
