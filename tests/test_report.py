"""The dataset report: what it finds on real media, how it shows that, and what it costs."""

from __future__ import annotations

import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOP, compose, fake_facts, fake_item, report_of, run_program, tree
from media_factory import make_clip, pattern

from runner.formats.captions import MAX_GLYPH_TOKENS, MAX_TOKENS
from runner.report import looks as looking
from runner.report.alike import NEAR, groups, nearest
from runner.report.html import html
from runner.report.looks import Look, look_at, look_at_clip, look_at_picture, measure
from runner.report.model import Report, Tokens
from runner.report.page import notices, page_lines, printable
from runner.report.tokens import count_tokens, estimate, may_be_cut
from runner.sources import Item, scan

SAMPLE = TOP / "runner" / "sample"
PHOTOS = sorted(SAMPLE.rglob("*.jpg"))
FINE = Look(900.0, 120.0, 50.0, 0, "")
BASE = ["engine=diffusers", "model=tiny", "optimizer=adamw", "precision=fp32", "memory=cpu"]


def photo(file: Path) -> Any:
    from PIL import Image

    return Image.open(file).convert("RGB")


def blurred(image: Any, radius: float) -> Any:
    """`image` blurred by so many pixels of the size it is measured at."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(radius * max(1, max(image.size) / looking.SIDE)))


def saved(image: Any, quality: int = 75) -> Any:
    from PIL import Image

    held = io.BytesIO()
    image.save(held, "JPEG", quality=quality)
    return Image.open(held).convert("RGB")


def distance(first: Look, second: Look) -> int:
    return (first.hash ^ second.hash).bit_count()


def report(items: list[Item], *overrides: str, looks: Any = None, tokens: Any = None) -> Report:
    config = compose(*BASE, *overrides)
    return report_of(config, fake_facts(config, items), looks, tokens)


def kinds(made: Report) -> dict[str, set[str]]:
    """The names each finding is about."""
    return {
        finding.kind: {made.media[i].name for case in finding.cases for i in case.media}
        for finding in made.findings
    }


# A sharp picture is not called blurred, its blurred copy is, and the worse the blur the lower the
# measure.
@pytest.mark.parametrize("file", PHOTOS, ids=lambda file: file.stem)
def test_blur_is_told_from_sharpness(file: Path) -> None:
    image = photo(file)
    seen = [measure(blurred(image, radius)) for radius in (0, 0.7, 1.5, 3)]
    assert [look.blurred for look in seen] == [False, False, True, True]
    assert sorted(seen, key=lambda look: -look.sharpness) == seen


# A sharp subject before a soft background is sharp.
def test_a_soft_background_is_no_blur() -> None:
    image = photo(PHOTOS[0])
    width, height = image.size
    soft = blurred(image, 6)
    box = (width // 2, height // 2, width * 3 // 4, height * 3 // 4)
    soft.paste(image.crop(box), box[:2])
    assert measure(blurred(image, 6)).blurred
    assert not measure(soft).blurred


# The same picture at any size is measured at one size.
def test_sharpness_does_not_grow_with_the_picture() -> None:
    image = photo(PHOTOS[0])
    large = image.resize((image.width * 4, image.height * 4))
    assert measure(large).sharpness <= measure(image).sharpness * 1.1


# Saved again at another size, quality or brightness a picture is near itself; another one is not.
def test_alike_pictures_are_near() -> None:
    from PIL import ImageEnhance

    seen = []
    for file in PHOTOS:
        image = photo(file)
        half = image.resize((image.width // 2, image.height // 2))
        changed = [saved(image, 30), saved(half, 40), ImageEnhance.Brightness(image).enhance(1.2)]
        look = measure(image)
        assert all(distance(look, measure(copy)) <= NEAR // 2 for copy in changed)
        seen.append(look)
    far = [distance(a, b) for at, a in enumerate(seen) for b in seen[at + 1 :]]
    assert min(far) > 3 * NEAR


# Every pair that is near is found, and groups are what near pairs tie together.
def test_groups_are_what_near_pairs_tie_together() -> None:
    random = np.random.default_rng(0)
    hashes = [int.from_bytes(random.bytes(16)) for _ in range(40)]

    def off(value: int, bits: int) -> int:
        for bit in random.choice(128, bits, replace=False):
            value ^= 1 << int(bit)
        return value

    hashes += [off(hashes[3], NEAR), off(hashes[5], NEAR + 1), hashes[7]]
    hashes.append(off(hashes[40], NEAR))
    found = groups(hashes)
    assert (7, 42) in found
    assert (3, 40, 43) in found
    assert len(found) == 2
    assert nearest(hashes[3], hashes[4:]) == 36
    assert nearest(hashes[5], hashes[41:42]) is None
    assert nearest(hashes[5], []) is None
    assert groups([]) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, and media that are wrong in each of the ways that a report knows."""
    from PIL import Image

    top = tmp_path_factory.mktemp("it's [bad] <media> ünïcode")
    for file in SAMPLE.rglob("*"):
        if file.suffix in (".jpg", ".mp4", ".txt"):
            shutil.copy(file, top / file.name)
    image = photo(PHOTOS[0])
    made = {
        "blurred.jpg": blurred(image, 2.5),
        "again.jpg": saved(photo(PHOTOS[1]).resize((900, 600)), 60),
        "black.png": Image.new("RGB", (640, 640), (3, 3, 3)),
        "grey.png": Image.new("RGB", (640, 640), (128, 128, 128)),
        "tiny.png": Image.fromarray(pattern((90, 60))),
        "wide.png": Image.fromarray(pattern((1200, 200))),
        "<script>alert(1)</script>.png".replace("/", "∕"): Image.fromarray(pattern((640, 640), 3)),
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


def looked(path: Path, kind: str, cache: Path, *, keep: bool = False) -> dict[str, Look]:
    return look_at(scan(kind, path, max_bytes=10**9).items, cache, keep=keep)


# Each way a medium can be wrong is found in it and in no other.
def test_what_is_wrong_is_found(folder: Path, tmp_path: Path) -> None:
    items = list(scan("folder", folder, max_bytes=10**9).items)
    looks = look_at(items, tmp_path, keep=False)
    made = report(items, "dataset.resolution=[512,512]", "dataset.target_frames=[5,9]", looks=looks)
    found = kinds(made)
    assert found["blurred"] == {"blurred.jpg"}
    assert found["flat"] == {"grey.png", "black.png"} | {
        item.name for item in items if item.name == "short.mp4" and looks[item.sha256].flat
    }
    assert found["turned"] == {"turned.jpg"}
    assert found["equal"] == {"coffee.jpg", "copy.jpg"}
    assert found["captioned"] == {"rocket.jpg", "other words.jpg"}
    assert found["alike"] >= {"again.jpg", "chelsea.jpg"}
    assert "tiny.png" in found["tiny"]
    assert "wide.png" in found["cut"]
    assert found["long-quote"] == {"sign.png"}
    assert "unseen" not in found
    assert [out.name for out in made.left_out] == ["short.mp4"]


# A clip that is black where its key frame is, as in a fade, is judged by a later frame.
def test_a_fade_is_not_black(folder: Path) -> None:
    look = look_at_clip(folder / "fade.mp4")
    assert look.fine
    assert look.brightness > 50
