"""Pictures are trained on as a viewer shows them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOP
from odd_media import CORNERS, corners_of, saved, wide_profile
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from runner.data.corrections import pictures
from runner.data.corrections.model import Correction, picture_correction
from runner.data.corrections.pictures import corrected_picture
from runner.data.sources.probe import Properties, probe_picture

CHANNELS = (48, 64, 3)
RAMP = np.linspace(0, 65535, 48 * 64).reshape(48, 64)
GREY = np.asarray(RAMP / 257 + 0.5, np.uint8)
SMOOTH = np.dstack([np.tile(np.arange(64) * 4, (48, 1)), np.tile(np.arange(48) * 5, (64, 1)).T])
SMOOTH = np.dstack([SMOOTH, np.full((48, 64), 90)]).astype(np.uint8)


def seen(data: bytes, background: str = "#ffffff") -> tuple[Properties, Correction, np.ndarray]:
    """A picture's properties and correction, and the pixels [H, W, 3] that are trained on."""
    with warnings.catch_warnings():
        # No warning of a library's reaches the user.
        warnings.simplefilter("error")
        found = probe_picture(io.BytesIO(data))
        correction = picture_correction(found.mode, found.display, background)
        image = corrected_picture(io.BytesIO(data), correction)
    assert (image.mode, image.size) == ("RGB", found.size)
    return found, correction, np.asarray(image)


def difference(first: np.ndarray, second: Any) -> int:
    """The largest difference of two pictures."""
    return int(np.abs(first.astype(int) - np.asarray(second).astype(int)).max())


def corners(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture with a colour in each corner."""
    return Image.fromarray(CORNERS.repeat(size[1] // 2, 0).repeat(size[0] // 2, 1))


# EXIF's orientation is applied in every format that has one, all eight.
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif, "quality": 100}
    if kind == "TIFF":
        options = {"tiffinfo": {0x0112: orientation}}
    data = saved(corners(), kind, **options)
    image = corners()
    image.getexif()[0x0112] = orientation
    truth = np.asarray(ImageOps.exif_transpose(image))
    _, correction, pixels = seen(data)
    assert pixels.shape == truth.shape
    assert difference(np.array(corners_of(pixels)), corners_of(truth)) <= 6
    # PIL turns a TIFF itself, for the trainer too.
    assert bool(correction) == (orientation != 1 and kind != "TIFF")


# HEIC is read, turned as the file says (made by libheif; an irot property added).
def test_heic_is_read() -> None:
    data = (TOP / "tests/fixtures/turned.heic").read_bytes()
    found, correction, pixels = seen(data)
    assert found.size == (48, 64)
    # musubi-tuner can't open it, whatever its name ends in.
    assert correction.only_rgb
    truth = corners_of(np.asarray(corners().transpose(Image.Transpose.ROTATE_270)))
    assert difference(np.array(corners_of(pixels)), truth) <= 12


# 16-bit, 32-bit and float pictures are scaled: a ramp stays a ramp.
@pytest.mark.parametrize(
    ("values", "kind", "white"),
    [
        (RAMP.astype(np.uint16), "PNG", 65535.0),
        (RAMP.astype(np.uint16), "TIFF", 65535.0),
        (RAMP.astype(np.int32), "TIFF", 65535.0),
        ((RAMP / 65535).astype(np.float32), "TIFF", 1.0),
        ((RAMP / 65535 * 1.5).astype(np.float32), "TIFF", 1.5),
        ((RAMP / 257).astype(np.float32), "TIFF", 255.0),
        (RAMP.astype(np.float32), "TIFF", 65535.0),
        ((RAMP / 65535 * 2 - 1).astype(np.float32), "TIFF", 1.0),
        ((RAMP * 100).astype(np.int32), "TIFF", 6553500.0),
    ],
)
def test_deep_pictures_are_scaled(values: np.ndarray, kind: str, white: float) -> None:
    _, correction, pixels = seen(saved(Image.fromarray(values), kind))
    assert correction.white == pytest.approx(white)
    assert difference(pixels, np.dstack([GREY] * 3)) <= 1


# What is not a number is black or white, not an error.
def test_floats_that_are_no_numbers() -> None:
    values = np.full((48, 64), 0.5, np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    _, _, pixels = seen(saved(Image.fromarray(values), "TIFF"))
    assert pixels[0, 0].tolist() == [0] * 3
    assert pixels[0, 1].tolist() == [255] * 3
    assert pixels[5, 5].tolist() == [128] * 3


def cutout() -> np.ndarray:
    """RGBA: noise that is hidden, a half-transparent band and an opaque square."""
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 4)).astype(np.uint8)
    image[..., 3] = 0
    image[30:, :, 3] = 128
    image[10:20, 10:20] = (255, 0, 0, 255)
    return image


# Transparency is blended onto the background, in every format and mode that has it.
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("background", ["#ffffff", "#000000", "#336699"])
def test_transparency_is_blended(kind: str, background: str) -> None:
    image = cutout()
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    _, correction, pixels = seen(saved(Image.fromarray(image), kind, **options), background)
    assert correction.background == background
    colour = np.array([int(background[at : at + 2], 16) for at in (1, 3, 5)])
    alpha = image[..., 3:] / 255
    assert difference(pixels, image[..., :3] * alpha + colour * (1 - alpha)) <= 1


# So also grey with alpha, a transparent colour of a palette, and one colour that is transparent.
def test_other_kinds_of_transparency() -> None:
    grey = Image.fromarray(cutout()).convert("LA")
    _, _, pixels = seen(saved(grey, "PNG"))
    assert pixels[0, 0].tolist() == [255] * 3
    assert pixels[12, 12].tolist() == [76] * 3
    palette = corners().quantize(4)
    index = palette.getpixel((1, 1))
    _, _, pixels = seen(saved(palette, "PNG", transparency=index))
    assert corners_of(pixels)[0] == [255] * 3
    assert difference(np.array(corners_of(pixels)[1:]), corners_of(np.asarray(corners()))[1:]) <= 4
    _, _, pixels = seen(saved(corners(), "PNG", transparency=tuple(CORNERS[0, 0].tolist())))
    assert corners_of(pixels)[0] == [255] * 3


# A picture with an alpha channel that hides nothing is as it was, and its key is.
def test_opaque_alpha_needs_no_correction() -> None:
    image = cutout()
    image[..., 3] = 255
    _, correction, pixels = seen(saved(Image.fromarray(image), "PNG"))
    assert correction.only_rgb
    assert np.array_equal(pixels, image[..., :3])


# Colours of another profile come out in sRGB, also with alpha and in a palette; those of sRGB, of a
# damaged profile and of one for other pictures stay as they are.
def test_colours_come_out_in_srgb() -> None:
    profile, image = wide_profile(), Image.fromarray(SMOOTH)
    truth = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    assert truth is not None
    assert difference(np.asarray(truth), SMOOTH) > 50
    for one in (image, image.convert("RGBA")):
        _, correction, pixels = seen(saved(one, "PNG", icc_profile=profile))
        assert correction.profile
        assert np.array_equal(pixels, np.asarray(truth))
    palette = image.quantize(64)
    exact = palette.convert("RGB")
    assert np.array_equal(
        seen(saved(palette, "PNG", icc_profile=profile))[2],
        seen(saved(exact, "PNG", icc_profile=profile))[2],
    )
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for harmless in (srgb, b"damaged" * 30):
        _, correction, pixels = seen(saved(image, "PNG", icc_profile=harmless))
        assert not correction
        assert np.array_equal(pixels, SMOOTH)
    grey = image.convert("L")
    _, correction, pixels = seen(saved(grey, "PNG", icc_profile=profile))
    assert correction.only_rgb
    assert np.array_equal(pixels[..., 0], np.asarray(grey))


# CMYK comes out in sRGB.
def test_cmyk_becomes_rgb() -> None:
    image = corners().convert("CMYK")
    _, correction, pixels = seen(saved(image, "JPEG", quality=100))
    assert correction.only_rgb
    assert difference(np.array(corners_of(pixels)), corners_of(np.asarray(corners()))) <= 8


# The first of several pictures is taken, and their number is known.
@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_picture_is_taken(kind: str) -> None:
    several = [Image.fromarray(np.full(CHANNELS, value, np.uint8)) for value in (50, 200, 90)]
    data = saved(several[0], kind, save_all=True, append_images=several[1:], duration=100)
    found, correction, pixels = seen(data)
    assert found.display.pictures == 3
    assert difference(pixels, np.full(CHANNELS, 50)) <= 2
    assert not correction.changes


# A photograph of 108 megapixels is read at a part of its size, in the decoder for a JPEG; one that
# no memory holds is refused.
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_huge_pictures_are_read_smaller(kind: str) -> None:
    data = saved(corners((12000, 9000)), kind)
    found, correction, pixels = seen(data)
    assert found.size == (6000, 4500)
    assert correction.shrink == 2
    assert difference(np.array(corners_of(pixels)), corners_of(np.asarray(corners()))) <= 6


def test_pictures_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 3000)
    with pytest.raises(Exception, match="it has 0 megapixels, and 0 is the limit"):
        probe_picture(io.BytesIO(saved(corners(), "PNG")))


# A PNG whose checksums are right and whose pixels are short is no picture.
def test_short_pixels_are_seen(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">2I5B", 64, 48, 8, 2, 0, 0, 0))
    for pixels in (zlib.compress(bytes(64 * 10)), b"garbage"):
        data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        with pytest.raises((OSError, SyntaxError)):
            probe_picture(io.BytesIO(data))
    # Nor is one with a chunk that states gigabytes; nothing is reserved for them.
    with pytest.raises((OSError, SyntaxError)):
        probe_picture(io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + b"\x7f\xff\xff\xfftEXt" + bytes(99)))


# A file that only calls itself a picture starts no other program: EPS would start Ghostscript.
def test_other_formats_are_not_tried() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(UnidentifiedImageError):
        probe_picture(io.BytesIO(data))
