"""Wrong input: one clear line, exit code 2, and not a file written."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_program, tree
from in_process import program_here
from media_factory import make_image
from PIL import Image

from runner.data.sources import scan_index

REHEARSE = ("experiment=rehearsal", "dataset=auto")


def picture(file: Path, caption: str | None = "a grey square") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (90, 90, 90)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)
    return file


def zipped(place: Path, *files: Path) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for file in files:
            archive.write(file, file.name)
    return place


def missing_path(cwd: Path) -> list[str]:
    picture(cwd / "mydata" / "a.png")
    return ["dataset.path=mydta"]


def no_zip(cwd: Path) -> list[str]:
    (cwd / "broken.zip").write_bytes(b"PK\x03\x04 not a zip at all")
    return ["dataset.path=broken.zip"]


def zip_without_media(cwd: Path) -> list[str]:
    (cwd / "notes.txt").write_text("hello")
    zipped(cwd / "empty.zip", cwd / "notes.txt")
    return ["dataset.path=empty.zip"]


def no_captions(cwd: Path) -> list[str]:
    picture(cwd / "d" / "a.png")
    picture(cwd / "d" / "b.png", caption=None)
    picture(cwd / "d" / "deep" / "c.png", caption=None)
    return ["dataset.path=d"]


def pictures_alone(cwd: Path) -> list[str]:
    picture(cwd / "d" / "a.png")
    return ["dataset.path=d", "task=i2v"]


def several_zips(cwd: Path) -> list[str]:
    file = picture(cwd / "x" / "a.png")
    (cwd / "data").mkdir()
    zipped(cwd / "data" / "one.zip", file)
    zipped(cwd / "data" / "two.zip", file)
    return ["dataset.path=data"]


def leaves_the_folder(cwd: Path) -> list[str]:
    with zipfile.ZipFile(cwd / "evil.zip", "w") as archive:
        archive.writestr("../../evil.png", b"x")
    return ["dataset.path=evil.zip"]


def has_a_link(cwd: Path) -> list[str]:
    with zipfile.ZipFile(cwd / "link.zip", "w") as archive:
        entry = zipfile.ZipInfo("passwd.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return ["dataset.path=link.zip"]


def too_large(cwd: Path) -> list[str]:
    with zipfile.ZipFile(cwd / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2_000_000))
    return ["dataset.path=bomb.zip", "dataset.max_archive_gb=0.001"]


def empty_folder(cwd: Path) -> list[str]:
    (cwd / "data").mkdir()
    return ["dataset.path=data"]


def all_held_out(cwd: Path) -> list[str]:
    picture(cwd / "d" / "a.png")
    return ["dataset.path=d", "dataset.validation_fraction=0.9999999"]


def bad_jsonl(cwd: Path) -> list[str]:
    picture(cwd / "a.png")
    (cwd / "items.jsonl").write_text('{"image_path": "a.png", "caption": "x"}\n{"image_path": \n')
    return ["dataset.path=items.jsonl"]


def no_musubi(cwd: Path) -> list[str]:
    picture(cwd / "d" / "a.png")
    return ["dataset.path=d", "engine=musubi", "model=hunyuan15_720p", "engine.path=nowhere"]


def engine_and_model(cwd: Path) -> list[str]:
    picture(cwd / "d" / "a.png")
    return ["dataset.path=d", "model=hunyuan15_720p"]


CASES: list[Callable[[Path], list[str]]] = [
    missing_path,
    no_zip,
    zip_without_media,
    no_captions,
    pictures_alone,
    several_zips,
    leaves_the_folder,
    has_a_link,
    too_large,
    empty_folder,
    all_held_out,
    bad_jsonl,
    no_musubi,
    engine_and_model,
]


# Each wrong input is reported in one line, kept whole in a golden file, and nothing is written.
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_wrong_input(
    case: Callable[[Path], list[str]],
    tmp_path: Path,
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is found out about media goes to the cache once they have lain unchanged for so long,
    # which on a slow machine these would have.
    monkeypatch.setattr(scan_index, "RACY_NS", 10**15)
    arguments = case(tmp_path)
    before = tree(tmp_path)
    # Two as a person meets them; the others in this process, which is the same but for its start.
    program = run_program if case in (no_zip, missing_path) else program_here
    done = program(*REHEARSE, *arguments, cwd=tmp_path)
    assert done.code == 2, done.out + done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert tree(tmp_path) == before
    golden(f"errors/{case.__name__}.txt", done.err.replace(str(tmp_path), "<folder>"))


# A cache that can't be written to is one line, whatever notices it first.
@pytest.mark.parametrize("in_the_way", ["out", "out/cache"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, in_the_way: str) -> None:
    (tmp_path / "media").mkdir()
    make_image(tmp_path / "media" / "a.png", (64, 64))
    (tmp_path / "media" / "a.txt").write_text("a")
    place = tmp_path / in_the_way
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file, and no folder")
    done = program_here(
        *("engine=diffusers", "model=tiny", "optimizer=adamw", "precision=fp32", "memory=cpu"),
        *("dataset.path=media", "output_dir=out", "tracking=none", "dataset.resolution=[64,64]"),
        cwd=tmp_path,
    )
    assert done.code in (1, 2), done.err
    assert "Traceback" not in done.err
    assert "Not a directory" in done.err or "File exists" in done.err
