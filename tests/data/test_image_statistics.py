"""What a dataset report sees in pixels, and that it looks at none twice."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bad_media import PHOTOS, blurred, make_bad_media, photo, saved
from conftest import compose, fake_facts, report_of, tree
from media_factory import make_image, with_corrections
from odd_media import odd_clip

from runner.data.corrections.model import NO_CORRECTION as PLAIN
from runner.data.corrections.model import Correction
from runner.data.report import image_statistics as looking
from runner.data.report.image_statistics import (
    ImageStatistics,
    measure,
    measure_all,
    measure_clip,
    measure_picture,
    statistics_key,
)
from runner.data.report.near_duplicates import NEAR, groups, nearest
from runner.data.sources import scan


def distance(first: ImageStatistics, second: ImageStatistics) -> int:
    return (first.hash ^ second.hash).bit_count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bad_media(tmp_path_factory.mktemp("media") / "it's [bad] <media> ünïcode")


def looked(path: Path, kind: str, cache: Path, *, keep: bool = False) -> dict[str, ImageStatistics]:
    items = scan(kind, path, max_bytes=10**9).media
    return measure_all(with_corrections(items), cache, keep=keep)


# A sharp picture is not called blurred, its blurred copy is, and the worse the blur the lower the
# measure.
@pytest.mark.parametrize("file", PHOTOS, ids=lambda file: file.stem)
def test_blur_is_reported_from_sharpness(file: Path) -> None:
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
def test_sharpness_does_not_hang_on_size() -> None:
    image = photo(PHOTOS[0])
    large = image.resize((image.width * 4, image.height * 4))
    assert 0.2 < measure(large).sharpness / measure(image).sharpness < 1.1


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
    # Two that are far from each other, and a third between them.
    middle = hashes[0]
    assert groups([middle ^ 0xFF, middle ^ 0xFF00, middle, hashes[1]]) == [(0, 1, 2)]


# A clip that is black where its key frame is, as in a fade, is judged by a later frame.
def test_a_fade_is_not_black(folder: Path) -> None:
    look = measure_clip(folder / "fade.mp4")
    assert look.fine
    assert look.brightness > 50


# Of a picture and a clip that look different as stored, both are shown.
def test_before_and_after(tmp_path: Path) -> None:
    turned = odd_clip(tmp_path / "a.mp4", orientation=6)
    after = measure_clip(turned, Correction(orientation=6))
    before = measure_clip(turned)
    assert (after.stored, before.stored) == (before.thumbnail, "")
    assert after.thumbnail != before.thumbnail
    with make_image(tmp_path / "b.png").open("rb") as stream:
        picture = measure_picture(stream, Correction(orientation=3))
    assert picture.stored not in ("", picture.thumbnail)


# What was seen is kept by content, so that another run or another place of the same media looks at
# no pixel again; what a crash tore or another version left is not taken for it.
def test_nothing_is_looked_at_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = looked(folder, "folder", cache, keep=True)
    files = sorted(cache.rglob("*.json"))
    assert len(files) == len(first)
    assert all(file.parent.name == file.name[:2] for file in files)
    assert not list(cache.rglob("*.tmp"))
    archive = tmp_path / "media.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for file in folder.iterdir():
            made.write(file, f"inner/{file.name}")
    before = tree(cache)
    with monkeypatch.context() as patched:
        patched.setattr(looking, "measure", lambda image: pytest.fail("looked again"))
        assert looked(archive, "zip", cache, keep=True) == first
    assert tree(cache) == before
    files[0].write_text(files[0].read_text()[:50])
    files[1].write_text("{}")
    assert looked(folder, "folder", cache, keep=True) == first
    monkeypatch.setattr(looking, "STATISTICS_VERSION", looking.STATISTICS_VERSION + 1)
    looked(folder, "folder", cache, keep=True)
    assert len(sorted(cache.rglob("*.json"))) == 2 * len(first)


# Media in a zip are seen as those in a folder are, and without leave nothing is written.
def test_a_zip_is_seen_as_a_folder(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "media.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        for file in folder.iterdir():
            made.write(file, file.name)
    before = tree(tmp_path)
    cache = tmp_path / "cache"
    assert looked(archive, "zip", cache) == looked(folder, "folder", cache)
    assert tree(tmp_path) == before


# A medium that is gone or changed since it was scanned ends no run: the report says so.
def test_what_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    for number, file in enumerate(PHOTOS[:3]):
        shutil.copy(file, tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.txt").write_text("a caption")
    items = list(scan("folder", tmp_path, max_bytes=10**9).media)
    (tmp_path / "1.jpg").unlink()
    shutil.copy(PHOTOS[3], tmp_path / "2.jpg")
    looks = measure_all(with_corrections(items), tmp_path / "cache", keep=True)
    assert set(looks) == {statistics_key(items[0], PLAIN)}
    config = compose("dataset.resolution=[256,256]")
    made = report_of(config, fake_facts(config, items), looks)
    (unseen,) = (finding for finding in made.findings if finding.category == "unseen")
    assert [made.media[i].name for case in unseen.cases for i in case.media] == ["1.jpg", "2.jpg"]


# Pictures of any size and mode that training takes can be looked at.
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3), (7, 5), (2000, 40)])
def test_every_mode_and_size(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("L", size, 255).convert("I").convert("I;16") if mode == "I;16" else None
    image = image or Image.new("RGB", size, "white").convert(mode if mode != "LA" else "L")
    file = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    (image.convert("LA") if mode == "LA" else image).save(file)
    with file.open("rb") as stream:
        look = measure_picture(stream)
    assert look.flat
    assert look.sharpness < 1
    assert look.thumbnail
