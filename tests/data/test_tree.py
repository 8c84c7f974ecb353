"""Which files of a folder are data, and what is said of the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import compose
from media_factory import make_clip, make_image

from runner.core.errors import UserError
from runner.data.ingest import ScanOptions, scan_sources
from runner.data.sources import Scan, locate, scan
from runner.data.sources.tree import files_of, without_outputs
from runner.formats.media_types import left_over
from runner.storage.shared_cache import SharedCache

RUN = ("run.json", "commands.sh", "samples/0.png", "dataset/media/a.png")


def looked_at(folder: Path) -> Scan:
    return scan("folder", folder, max_bytes=10**9)


def made(top: Path, *names: str) -> None:
    for name in names:
        file = top / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            make_image(file)
        else:
            file.write_text("x")


# What runs wrote into a folder is never data: their output folder whatever it is called, a run's
# folder wherever it was moved, and in an archive too. What lies beside it is.
def test_outputs_are_no_data(tmp_path: Path) -> None:
    made(tmp_path, "a.png", "out/a.png")
    for root in ("out/outputs", "."):
        made(tmp_path / root, "cache/cache.lock", "cache/media/ab/ab.png", "runs/x/samples/1.png")
        made(tmp_path / root, "mlartifacts/1/2/artifacts/0.png")
    made(tmp_path / "moved", *RUN)
    made(tmp_path / "other", "mlflow.db", "mlartifacts/1/2/0.png", "mine/b.png")
    found = looked_at(tmp_path)
    assert [item.name for item in found.media] == ["a.png", "other/mine/b.png", "out/a.png"]
    notice = next(one for one in found.notices if "output of this program" in one)
    assert "cache/, mlartifacts/, moved/ and 5 more" in notice
    shutil.make_archive(str(tmp_path / "m"), "zip", tmp_path)
    packed = scan("zip", tmp_path / "m.zip", max_bytes=10**9)
    assert [item.name for item in packed.media] == [item.name for item in found.media]


# The output folder of this run is none either, before anything in it says what it is; but a dataset
# inside it is one.
def test_the_own_output_folder_is_no_data(tmp_path: Path) -> None:
    made(tmp_path, "a.png", "a.txt", "out/b.png", "out/b.txt")
    config = compose(f"dataset.path={tmp_path}")
    store = SharedCache(tmp_path / "out" / "cache")
    (source,) = scan_sources(config, tmp_path, store, ScanOptions())
    assert [item.name for item in source.media] == ["a.png"]
    assert source.notices == ("Left out, being the output of this program: out/.",)
    config = compose(f"dataset.path={tmp_path / 'out'}")
    (source,) = scan_sources(config, tmp_path, store, ScanOptions())
    assert [item.name for item in source.media] == ["b.png"]


# A folder of the same name, without a mark of a run, is data.
def test_other_folders_are_data() -> None:
    names = ["runs/a.png", "cache/b.png", "run.json", "x/commands.sh", "x/c.png", "x/y/run.json"]
    assert without_outputs(names) == (names, [])
    run = [f"deep/run/{name}" for name in RUN]
    assert without_outputs([*names, *run]) == (names, ["deep/run/"])


# Whatever lies beside the media is told by ending and number, files of text apart, which captions
# may be in; what a system leaves behind is not worth a word.
def test_what_is_left_over_is_counted() -> None:
    names = [
        "a.png",
        "B.MP4",
        "c.psd",
        "d/e.PSD",
        "f.npz",
        "LICENSE",
        "a.txt",
        "m.csv",
        "Thumbs.db",
    ]
    assert left_over(
        [*names, "Thumbs.db", ".DS_Store", "d/._a.png", "__MACOSX/a.png", ".x/notes"]
    ) == (
        "Left out, being neither pictures, clips nor captions: 2 .psd, 1 .npz, 1 without an ending."
    )
    assert left_over(["a.png", "a.txt", "._a.png"]) is None
    # Media in hidden places are left out as ever, but not in silence.
    assert left_over(["a.png", ".b.png", "d/.thumbs/c.jpg", ".x/d.txt"]) == (
        "Left out, being hidden: 2 pictures or clips such as .b.png."
    )


# Every ending is read by its content, whatever its case; what musubi-tuner can't open gets a copy.
def test_endings(tmp_path: Path) -> None:
    for name in ("a.JFIF", "b.jpe", "c.Tif", "d.tiff", "e.gif", "f.avif"):
        make_image(tmp_path / name.lower()).rename(tmp_path / name)
    for name in ("g.m4v", "h.mpg", "i.ts", "j.WMV", "k.3gp", "l.flv"):
        make_clip(tmp_path / name.lower(), 13).rename(tmp_path / name)
    found = looked_at(tmp_path)
    assert [item.media_kind for item in found.media] == ["image"] * 6 + ["video"] * 6
    assert (found.ignored, found.notices) == ((), ())
    assert {item.frames for item in found.media} == {1, 13}


# Files that aren't regular are named and not opened: a pipe would block for ever.
def test_special_files_are_named(tmp_path: Path) -> None:
    made(tmp_path, "a.png")
    for name in ("a.psd", "noise", "p.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.bin").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to("nowhere")
    found = looked_at(tmp_path)
    assert found.ignored == (("p.png", "can't be read: it is a broken link or not a regular file"),)
    assert found.notices == ("Left out, being no regular files: a.psd, gone, noise and 1 more.",)


# Names that are not UTF-8, or hold a new line, are told in a form that any terminal can take.
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    made(tmp_path, "a.png")
    for name in (b"b\xff.png", b"c\xff.psd", b"d\xff", b"n\nn.\n", b"o\no.png"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"x")
    os.mkfifo(os.fsdecode(bytes(tmp_path) + b"/e\xff.bin"))
    found = looked_at(tmp_path)
    assert found.ignored == (
        ("b\\udcff.png", "its file name is not UTF-8: rename it"),
        ("o\\no.png", "can't be read: it is not a picture"),
    )
    assert all(notice.encode() and "\n" not in notice for notice in found.notices)
    assert "e\\udcff" in found.notices[0]
    with pytest.raises(UserError, match="the name is not UTF-8") as caught:
        locate(os.fsdecode(b"d\xff"), cwd=tmp_path)
    assert str(caught.value).encode()


# A file of which more than half was never written, as a download leaves it, is told at once,
# however large it says it is.
def test_hollow_files_are_not_read(tmp_path: Path) -> None:
    made(tmp_path, "a.png")
    make_clip(tmp_path / "real.mp4", 13)
    for name in ("a.jpg", "real.mp4", "b.mp4"):
        with (tmp_path / name).open("ab") as file:
            file.truncate(10**11)
    if (tmp_path / "a.jpg").stat().st_blocks:
        pytest.skip("this file system keeps no holes")
    found = looked_at(tmp_path)
    assert [name for name, _ in found.ignored] == ["a.jpg", "b.mp4", "real.mp4"]
    assert {reason for _, reason in found.ignored} == {
        "can't be read: more than half of it was never written: get the file again"
    }


# Run without the rights that an ordinary user lacks too.
PROBE = """
import sys
from pathlib import Path
from runner.core.errors import UserError
from runner.data.sources import locate, scan
for path in sys.argv[1:]:
    try:
        kind, place = locate(path, cwd=Path.cwd())
        found = scan(kind, place, max_bytes=10**9)
        print([item.name for item in found.media], *found.ignored, *found.notices)
    except UserError as error:
        print("error:", error)
"""


# A folder that can't be listed or entered, and a file that can't be read, are named; as a source
# they are one line.
def test_closed_folders_are_named(tmp_path: Path) -> None:
    made(tmp_path / "d", "a.png", "closed/b.png", "listed/c.png", "listed/c.txt", "secret.png")
    made(tmp_path, "top/a.png", "m.zip")
    modes = {"d/closed": 0o000, "d/listed": 0o444, "d/secret.png": 0, "top": 0, "m.zip": 0}
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    command = [sys.executable, "-c", PROBE, "d", "top", "top/a.png", "m.zip"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv to take that away")
        rights = "-dac_override,-dac_read_search"
        command[:0] = ["setpriv", "--bounding-set", rights, "--inh-caps", rights]
    top = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{top}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    for name in modes:
        (tmp_path / name).chmod(0o755)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "['a.png'] ('secret.png', \"can't be read: Permission denied\") Left out, because it can't "
        "be read: closed/ (Permission denied), listed/ (Permission denied).",
        "error: top can't be read: Permission denied",
        "error: top/a.png can't be read: Permission denied",
        f"error: {tmp_path / 'm.zip'} can't be read: Permission denied",
    ]


# However deep folders go, and however they are linked, the walk ends.
def test_deep_and_circular_folders(tmp_path: Path) -> None:
    deep = [tmp_path / "d"]
    for _ in range(1500):
        deep[-1].mkdir()
        deep.append(deep[-1] / "d")
    made(tmp_path, "a.png")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    assert list(files_of(tmp_path).files) == ["a.png"]
    for folder in reversed(deep[:-1]):
        folder.rmdir()
