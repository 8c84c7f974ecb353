"""Media that are wrong in each of the ways that a dataset report knows."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from conftest import TOP
from media_factory import make_clip, pattern

from runner.data.report.image_statistics import SIDE

SAMPLE = TOP / "runner" / "data" / "sample"
PHOTOS = sorted(SAMPLE.rglob("*.jpg"))


def photo(file: Path) -> Any:
    from PIL import Image

    return Image.open(file).convert("RGB")


def blurred(image: Any, radius: float) -> Any:
    """`image` blurred by so many pixels of the size it is measured at."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(radius * max(1, max(image.size) / SIDE)))


def saved(image: Any, quality: int = 75) -> Any:
    from PIL import Image

    held = io.BytesIO()
    image.save(held, "JPEG", quality=quality)
    return Image.open(held).convert("RGB")


def make_bad_media(top: Path) -> Path:
    """The sample, and media that are wrong in each of the ways that a report knows."""
    from PIL import Image

    top.mkdir()
    for file in SAMPLE.rglob("*"):
        if file.suffix in (".jpg", ".mp4", ".txt"):
            shutil.copy(file, top / file.name)
    image = photo(PHOTOS[0])
    made = {
        "blurred.jpg": blurred(image, 2.5),
        "again.jpg": saved(photo(PHOTOS[1]).resize((900, 600)), 60),
        "night.png": photo(PHOTOS[0]).point(lambda value: value // 14),
        "grey.png": Image.new("RGB", (640, 640), (128, 128, 128)),
        "tiny.png": Image.fromarray(pattern((90, 60))),
        "wide.png": Image.fromarray(pattern((1200, 200))),
        "<img src=x onerror=alert(1)>.png": Image.fromarray(pattern((640, 640), 3)),
    }
    for name, picture in made.items():
        picture.save(top / name, **({"quality": 90} if name.endswith("jpg") else {}))
        (top / name).with_suffix(".txt").write_text(f'caption of <b>{name}</b> & "more"')
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(PHOTOS[2]).transpose(Image.Transpose.ROTATE_90).save(top / "turned.jpg", exif=exif)
    (top / "turned.txt").write_text("turned")
    shutil.copy(top / "coffee.jpg", top / "copy.jpg")
    (top / "copy.txt").write_text((top / "coffee.txt").read_text())
    shutil.copy(top / "rocket.jpg", top / "other words.jpg")
    (top / "other words.txt").write_text("another caption")
    (top / "long.txt").write_text("many words of it " * 400)
    Image.fromarray(pattern((700, 700), 9)).save(top / "long.png")
    (top / "sign.txt").write_text(f'a sign that says "{"a" * 140}"')
    Image.fromarray(pattern((700, 690), 11)).save(top / "sign.png")
    (top / "broken.jpg").write_bytes(PHOTOS[0].read_bytes()[:3000])
    make_clip(top / "short.mp4", 3, size=(960, 544))
    (top / "short.txt").write_text("a short clip")
    # It begins black, as a fade does; its key frame is the first.
    frames = [np.zeros((128, 128, 3), np.uint8)] * 4 + [pattern((128, 128))] * 8
    make_clip(top / "fade.mp4", pictures=frames)
    (top / "fade.txt").write_text("a fade")
    return top
