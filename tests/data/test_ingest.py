"""A zip read once: looked at, unpacked and remembered; cut off, it is gone on with."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, tree
from media_factory import key_of, make_clip, make_image, pattern, with_corrections
from odd_media import odd_clip, saved

from runner.core.errors import UserError
from runner.data.ingest import ScanOptions, scan_sources
from runner.data.select import Source
from runner.data.sources import check_unchanged, media_reader, scan_index, unpack
from runner.data.sources.scan import workers
from runner.storage import bulk_writer
from runner.storage import shared_cache as storing
from runner.storage.bulk_writer import BulkWriter
from runner.storage.shared_cache import SharedCache


@pytest.fixture(autouse=True)
def files_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has just written is not taken for being written still."""
    monkeypatch.setattr(scan_index, "RACY_NS", 0)


def zipped(path: Path, pictures: int = 12, clips: int = 3, **captions: str) -> Path:
    """A zip of captioned pictures and clips, each with bytes of its own."""
    made = path.parent / "made"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(pictures):
            file = made / f"p{number}.png"
            archive.write(make_image(file, (40 + number, 32)), file.name)
            archive.writestr(f"p{number}.txt", captions.get(f"p{number}", f"picture {number}"))
        for number in range(clips):
            file = made / f"c{number}.mp4"
            archive.write(make_clip(file, 13 + number), file.name)
            archive.writestr(f"c{number}.txt", f"clip {number}")
    return path


def store_of(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path / "outputs" / "cache")


def ingest(
    tmp_path: Path,
    *overrides: str,
    path: str = "m.zip",
    dry: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> Source:
    config = compose(f"dataset.path={tmp_path / path}", *overrides)
    reading = ScanOptions(progress, waiting, write=not dry)
    (source,) = scan_sources(config, tmp_path, store_of(tmp_path), reading)
    return source


# A run knows how many media it took out of an archive, and that an earlier one did.
def test_what_was_unpacked_is_counted(tmp_path: Path) -> None:
    zipped(tmp_path / "m.zip", pictures=3, clips=1)
    assert [ingest(tmp_path).unpacked for _ in range(2)] == [4, 0]
    assert ingest(tmp_path, dry=True).unpacked == 0


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Media of archives that are opened from here on."""
    names: list[str] = []
    real = zipfile.ZipFile.open

    def noted(self: Any, name: Any, mode: Any = "r", *rest: Any, **more: Any) -> Any:
        shown = name if isinstance(name, str) else name.filename
        if mode == "r" and not shown.endswith(".txt"):
            names.append(shown)
        return real(self, name, mode, *rest, **more)

    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    return names


def probed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is looked at from here on."""
    seen: list[object] = []
    for name in ("probe_picture", "probe_clip"):
        real = getattr(media_reader, name)

        def noted(source: Any, real: Any = real) -> Any:
            seen.append(source)
            return real(source)

        monkeypatch.setattr(media_reader, name, noted)
    return seen


def entries(tmp_path: Path) -> dict[str, bytes]:
    """What lies in the media namespace under final names, notes aside."""
    namespace = tmp_path / "outputs" / "cache" / "media"
    files = [file for file in namespace.rglob("*") if file.is_file() and file.suffix != ".json"]
    return {file.name: file.read_bytes() for file in files}


# A real run reads each medium of a zip once, and has it in the store then: the very bytes, under
# the name of their sha256, read-only, with a note of what it is made of.
def test_one_pass(tmp_path: Path, opened: list[str]) -> None:
    zipped(tmp_path / "m.zip")
    source = ingest(tmp_path)
    assert sorted(opened) == sorted(item.name for item in source.media)
    kept = entries(tmp_path)
    assert sorted(kept) == sorted(key_of(item) for item in source.media)
    for item in source.media:
        assert hashlib.sha256(kept[key_of(item)]).hexdigest() == item.sha256
        place = store_of(tmp_path).path("media", key_of(item))
        assert place.stat().st_mode & 0o777 == 0o444
        note = json.loads(place.with_name(place.name + ".json").read_text())
        cache_inputs = {"as_rgb": False, "media": item.sha256}
        assert note == {"bytes": item.bytes, "made_of": cache_inputs, "sha256": item.sha256}
    assert not list((tmp_path / "outputs" / "cache" / "incoming").iterdir())
    assert not list((tmp_path / "outputs" / "cache" / "claims").iterdir())


# The next run, and a dry run, read no medium again and find the same.
def test_the_next_run_reads_nothing_again(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped(tmp_path / "m.zip")
    first = ingest(tmp_path)
    opened.clear()
    looked, before = probed(monkeypatch), tree(tmp_path)
    assert ingest(tmp_path, dry=True) == first
    assert tree(tmp_path) == before
    calls: list[tuple[str, int, int]] = []
    again = ingest(tmp_path, progress=lambda *call: calls.append(call))
    assert again == first
    assert opened == looked == []
    assert calls == [(str(tmp_path / "m.zip"), 15, 15)]


# So for a folder and for a JSONL file, whose media stay where they are.
def test_folders_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path / "m.zip")
    for file in (tmp_path / "made").iterdir():
        file.with_suffix(".txt").write_text("a caption")
    lines = [{"path": "made/p0.png", "caption": "one"}, {"path": "made/p0.png", "caption": "two"}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    looked = probed(monkeypatch)
    folder, jsonl = ingest(tmp_path, path="made"), ingest(tmp_path, path="l.jsonl")
    assert (len(folder.media), len(jsonl.media), len(looked)) == (15, 2, 17)
    assert not entries(tmp_path)
    looked.clear()
    assert (ingest(tmp_path, path="made"), ingest(tmp_path, path="l.jsonl")) == (folder, jsonl)
    assert looked == []
    # Captions are read each time, and are no part of what is remembered.
    (tmp_path / "made" / "p0.txt").write_text("another")
    assert ingest(tmp_path, path="made").media[3].caption == "another"
    # What was changed is looked at again, and it alone; also when size and time were put back.
    (tmp_path / "made" / "p1.png").write_bytes((tmp_path / "made" / "p2.png").read_bytes())
    stat = (tmp_path / "made" / "p3.png").stat()
    data = bytearray((tmp_path / "made" / "p3.png").read_bytes())
    data[-20] ^= 1
    (tmp_path / "made" / "p3.png").write_bytes(data)
    os.utime(tmp_path / "made" / "p3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = ingest(tmp_path, path="made")
    assert len(looked) == 2
    assert {item.name: item.sha256 for item in changed.media}["p1.png"] == next(
        item.sha256 for item in folder.media if item.name == "p2.png"
    )


# "Rename the zip, and nothing happens at all": it is read again, since its times may tell so, but
# nothing is unpacked, and every item is what it was.
def test_a_renamed_zip_is_not_unpacked_again(tmp_path: Path) -> None:
    zipped(tmp_path / "m.zip")
    first = ingest(tmp_path)
    namespace = tmp_path / "outputs" / "cache" / "media"
    before = {file: file.stat() for file in namespace.rglob("*") if file.is_file()}
    (tmp_path / "m.zip").rename(tmp_path / "new name [é].zip")
    again = ingest(tmp_path, path="new name [é].zip")
    assert [(i.name, i.sha256, i.caption) for i in again.media] == [
        (i.name, i.sha256, i.caption) for i in first.media
    ]
    after = {file: file.stat() for file in namespace.rglob("*") if file.is_file()}
    assert {f: (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for f, s in after.items()} == {
        f: (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for f, s in before.items()
    }


# A zip that was made anew under its old name is read anew.
def test_a_new_zip_of_the_same_name(tmp_path: Path) -> None:
    zipped(tmp_path / "m.zip")
    ingest(tmp_path)
    zipped(tmp_path / "m.zip", pictures=2, p0="new words")
    again = ingest(tmp_path)
    assert len(again.media) == 5
    assert {item.name: item.caption for item in again.media}["p0.png"] == "new words"


# A file changed within two seconds before it was read is not remembered: a change in the same
# instant could not be detected. Nor one whose time of change lies ahead.
def test_racy_files_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Days, so that a slow machine is within them too.
    monkeypatch.setattr(scan_index, "RACY_NS", 10**15)
    zipped(tmp_path / "m.zip")
    looked = probed(monkeypatch)
    ingest(tmp_path)
    ingest(tmp_path)
    assert len(looked) == 30
    monkeypatch.setattr(scan_index, "RACY_NS", 2_000_000_000)
    now = 10**18
    assert not scan_index.change_would_show((1, 1, 1, now - 3 * 10**9, now - 1 * 10**9), now)
    assert not scan_index.change_would_show((1, 1, 1, now - 1 * 10**9, now - 3 * 10**9), now)
    assert not scan_index.change_would_show((1, 1, 1, now - 3 * 10**9, now + 1), now)
    assert scan_index.change_would_show((1, 1, 1, now - 3 * 10**9, now - 3 * 10**9), now)
    # A camera's clock may be ahead; that of the file system counts.
    assert scan_index.change_would_show((1, 1, 1, now + 10**12, now - 3 * 10**9), now)


# A memo of another version, of other decoders, or damaged, is as good as none.
@pytest.mark.parametrize("damage", ["other version", "cut", "wrong types", "empty"])
def test_a_memo_that_cannot_be_used(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped(tmp_path / "m.zip")
    first = ingest(tmp_path)
    (file,) = (tmp_path / "outputs" / "cache" / "scans").iterdir()
    text = file.read_text()
    whole = json.loads(text)
    file.write_text(
        {
            "other version": json.dumps({**whole, "version": "0"}),
            "cut": text[: len(text) // 2],
            "wrong types": json.dumps({**whole, "media": {n: {"file": 1} for n in whole["media"]}}),
            "empty": "",
        }[damage]
    )
    looked = probed(monkeypatch)
    assert ingest(tmp_path) == first
    assert len(looked) == 15
    assert file.read_text() == text


class _Cut(BaseException):
    """As a signal would end it."""


def _cut_after(number: int) -> Callable[[str, int, int], None]:
    def progress(_path: str, done: int, _total: int) -> None:
        if done >= number:
            raise _Cut

    return progress


def held_up(monkeypatch: pytest.MonkeyPatch, *, wider_than: int) -> list[object]:
    """Looking at a wider picture takes until an interrupt came; what is looked at."""
    real: Any = getattr(media_reader, "probe_picture")  # noqa: B009
    shut_down: Any = ThreadPoolExecutor.shutdown
    interrupted = threading.Event()
    looked: list[object] = []

    def slow(stream: Any) -> Any:
        looked.append(stream)
        properties = real(stream)
        if properties.size[0] > wider_than:
            assert interrupted.wait(60)
        return properties

    def shutdown(self: ThreadPoolExecutor, *given: Any, **options: Any) -> None:
        shut_down(self, **{**options, "wait": False})
        interrupted.set()
        shut_down(self, *given, **options)

    monkeypatch.setattr(media_reader, "probe_picture", slow)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    return looked


# A zip that was half unpacked is gone on with: what was looked at is not read again.
def test_a_cut_ingestion_goes_on(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped(tmp_path / "m.zip", pictures=60)
    # By name the 39th medium and on: those before them are looked at while nothing is held up.
    held_up(monkeypatch, wider_than=79)
    with pytest.raises(_Cut):
        ingest(tmp_path, progress=_cut_after(20))
    some = entries(tmp_path)
    assert 20 <= len(some) < 63
    opened.clear()
    source = ingest(tmp_path)
    assert len(opened) <= 63 - 20
    store = store_of(tmp_path)
    missing = [item for item in source.media if not store.has("media", key_of(item))]
    with BulkWriter(store, "media", "a.zip") as arriving:
        unpack(with_corrections(missing), arriving, lambda _: None)
    assert sorted(entries(tmp_path)) == sorted(key_of(item) for item in source.media)
    assert entries(tmp_path).items() >= some.items()


# So after a crash that left files behind: they are cleared, and what was renamed stays.
def test_leftovers_of_a_crash_are_cleared(tmp_path: Path) -> None:
    zipped(tmp_path / "m.zip")
    left = tmp_path / "outputs" / "cache" / "incoming" / "media-of-another-zip"
    left.mkdir(parents=True)
    (left / "0").write_bytes(b"half")
    with BulkWriter(store_of(tmp_path), "media", "a third") as living:
        living.write(lambda write: write(b"not yet whole"))
        source = ingest(tmp_path)
        assert [file.read_bytes() for file in living.folder.iterdir()] == [b"not yet whole"]
    assert not left.exists()
    assert sorted(entries(tmp_path)) == sorted(key_of(item) for item in source.media)


# An interrupt does not wait for what is left.
def test_an_interrupt_ends_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path / "m.zip", pictures=200, clips=0)
    looked = held_up(monkeypatch, wider_than=40)
    with pytest.raises(_Cut):
        ingest(tmp_path, progress=_cut_after(1))
    # What was begun is done; of 200 nothing else is.
    assert 1 <= len(looked) <= 1 + workers()


# An entry is under its final name only when its bytes are on the disk, so that a power cut leaves
# whole entries or none.
def test_entries_are_synced_before_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped(tmp_path / "m.zip")
    synced: set[int] = set()
    real = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    rename = Path.replace
    named: list[Path] = []

    def checked(self: Path, target: Path) -> Path:
        if "media" in target.parts:
            assert self.stat().st_ino in synced, target
            named.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", checked)
    ingest(tmp_path)
    assert len(named) == 30  # with their notes


# A disk that is full, or fails when it is synced, is one line; nothing is left under a final name.
@pytest.mark.parametrize("where", ["write", "sync"])
def test_a_full_disk(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path / "m.zip")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    if where == "sync":
        monkeypatch.setattr(storing, "sync", full)
    else:
        monkeypatch.setattr(bulk_writer, "_open", lambda _: Full())
    with pytest.raises(UserError) as caught:
        ingest(tmp_path)
    assert "can't be written to (No space left on device)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == {}


# Equal media are kept once; a picture that is not RGB as an RGB copy, and not twice; what the run
# can't use is not unpacked.
def test_nothing_is_doubled(tmp_path: Path) -> None:
    from PIL import Image

    made = tmp_path / "made"
    make_image(made / "alpha.png", mode="RGBA")
    make_image(made / "b.png")
    make_clip(made / "short.mp4", 5)
    make_clip(made / "long.mp4", 30)
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for name in ("alpha.png", "b.png", "short.mp4", "long.mp4"):
            archive.write(made / name, name)
            archive.writestr(f"{name[:-4]}.txt", "words")
        archive.write(made / "b.png", "again/b.png")
        archive.writestr("again/b.txt", "other words")
        archive.write(made / "b.png", "bare.png")
    options = ("dataset.target_frames=[13]", "dataset.missing_captions=skip")
    source = ingest(tmp_path, *options)
    by_name = {item.name: item for item in source.media}
    assert len(by_name) == 6
    kept = entries(tmp_path)
    assert set(kept) == {key_of(by_name[n]) for n in ("alpha.png", "b.png", "long.mp4")}
    alpha = store_of(tmp_path).path("media", key_of(by_name["alpha.png"]))
    assert alpha.name.endswith("-rgb.png")
    with Image.open(alpha) as image, Image.open(made / "alpha.png") as original:
        assert image.mode == "RGB" and image.tobytes() == original.convert("RGB").tobytes()
    note = json.loads(alpha.with_name(alpha.name + ".json").read_text())
    assert note["sha256"] == hashlib.sha256(alpha.read_bytes()).hexdigest()
    ingest(tmp_path, *options, "task=i2v")
    assert set(entries(tmp_path)) == set(kept)
    (tmp_path / "other").mkdir()
    (tmp_path / "m.zip").rename(tmp_path / "other" / "m.zip")
    ingest(tmp_path / "other", *options, "task=i2v")
    assert set(entries(tmp_path / "other")) == {key_of(by_name["long.mp4"])}


# Corrected pictures are made while an archive is read; clips later, since that takes long.
def test_corrected_media_of_an_archive(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(Image.fromarray(pattern((64, 48))), "PNG", exif=exif)
    clip = odd_clip(tmp_path / "b.mp4", orientation=6)
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("a.png", turned)
        archive.write(clip, "b.mp4")
        for name in ("a.txt", "b.txt"):
            archive.writestr(name, "words")
    clip.unlink()
    source = ingest(tmp_path, "dataset.target_frames=[1]")
    assert ([item.name for item in source.media], source.ignored) == (["a.png", "b.mp4"], ())
    kept = entries(tmp_path)
    assert set(kept) == {key_of(item) for item in source.media if item.name == "a.png"}
    with Image.open(io.BytesIO(*kept.values())) as image:
        assert image.size == (48, 64)


# What will be refused for its captions, or as pictures for i2v, leaves no trace.
@pytest.mark.parametrize("override", ["task=t2v", "task=i2v"])
def test_refused_sources_leave_no_trace(override: str, tmp_path: Path) -> None:
    if override == "task=t2v":
        zipped(tmp_path / "m.zip", p3="")
    else:
        zipped(tmp_path / "m.zip", clips=0)
    before = tree(tmp_path)
    ingest(tmp_path, override)
    assert tree(tmp_path) == before


# Of two runs on one zip one unpacks and the other waits, says so, and finds it done.
def test_two_runs_read_it_once(tmp_path: Path, opened: list[str]) -> None:
    zipped(tmp_path / "m.zip")
    store, waited = store_of(tmp_path), threading.Event()
    found: list[Source] = []
    with BulkWriter(store, "media", str(tmp_path / "m.zip")):
        second = threading.Thread(target=lambda: found.append(ingest(tmp_path, waiting=waited.set)))
        second.start()
        assert waited.wait(20)
        assert opened == []
    second.join(60)
    assert len(found) == 1 and len(opened) == 15


# A run with nothing to unpack waits for nobody, nor do runs on different zips for each other.
def test_only_who_unpacks_the_same_waits(tmp_path: Path) -> None:
    zipped(tmp_path / "m.zip")
    ingest(tmp_path)
    waited: list[str] = []
    with BulkWriter(store_of(tmp_path), "media", str(tmp_path / "m.zip")):
        ingest(tmp_path, waiting=lambda: waited.append("the same"))
    with BulkWriter(store_of(tmp_path), "media", "another.zip"):
        (tmp_path / "m.zip").rename(tmp_path / "n.zip")
        ingest(tmp_path, path="n.zip", waiting=lambda: waited.append("another"))
    assert waited == []


# Media of a person's folder that change between the look and their use are noticed; a new time
# alone is not a change.
def test_changed_files_are_noticed(tmp_path: Path) -> None:
    zipped(tmp_path / "m.zip")
    for file in (tmp_path / "made").iterdir():
        file.with_suffix(".txt").write_text("a caption")
    items = ingest(tmp_path, path="made").media
    check_unchanged(items)
    os.utime(tmp_path / "made" / "p1.png")
    check_unchanged(items)
    make_image(tmp_path / "made" / "p1.png", (8, 8))
    with pytest.raises(UserError, match=r"p1\.png has changed since it was scanned"):
        check_unchanged(items)
    (tmp_path / "made" / "p1.png").unlink()
    with pytest.raises(UserError, match=r"p1\.png can't be read"):
        check_unchanged(items)


# So is an edit that leaves a file as long as it was.
def test_an_edit_of_equal_size_is_noticed(tmp_path: Path) -> None:
    picture = make_image(tmp_path / "made" / "a.png")
    picture.with_suffix(".txt").write_text("a caption")
    items = ingest(tmp_path, path="made").media
    data = picture.read_bytes()
    picture.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    # At another time, which the clock of a file system need not tell within a moment.
    os.utime(picture, ns=(1, 1))
    assert picture.stat().st_size == len(data)
    with pytest.raises(UserError, match=r"a\.png has changed since it was scanned"):
        check_unchanged(items)


# An archive that changes while it is read is not remembered, and what comes of it is checked.
def test_an_archive_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(tmp_path / "m.zip")

    def touch(_path: str, done: int, _total: int) -> None:
        if done == 1:
            os.utime(path)

    ingest(tmp_path, progress=touch)
    looked = probed(monkeypatch)
    ingest(tmp_path)
    assert looked


# An archive counts as read when its list was, not when a medium in it was: one listed within two
# seconds of its last change is not remembered, however long the reading takes.
def test_an_archive_is_as_old_as_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_index, "RACY_NS", 2_000_000_000)
    written = zipped(tmp_path / "m.zip").stat().st_ctime_ns
    # Whoever asks first, for the list, learns of it a second after the change; each further one
    # later.
    seconds = itertools.count(1, 10)
    monkeypatch.setattr(time, "time_ns", lambda: written + next(seconds) * 1_000_000_000)
    ingest(tmp_path)
    looked = probed(monkeypatch)
    ingest(tmp_path)
    assert len(looked) == 15


@pytest.fixture
def captured(tmp_path: Path) -> Iterator[BulkWriter]:
    with BulkWriter(store_of(tmp_path), "media", "a.zip") as arriving:
        yield arriving


# What the dataset stage unpacks is what the first look would have kept; an entry that is to be made
# anew, as a damaged one is, is put in place of the other.
def test_unpacking_makes_the_same_entries(tmp_path: Path) -> None:
    made = zipped(tmp_path / "m.zip").parent / "made"
    make_image(made / "alpha.png", mode="RGBA")
    with zipfile.ZipFile(tmp_path / "m.zip", "a") as archive:
        archive.write(made / "alpha.png", "alpha.png")
        archive.writestr("alpha.txt", "clear")
    items = ingest(tmp_path, dry=True).media
    store, done = store_of(tmp_path), list[int]()
    with BulkWriter(store, "media", "a.zip") as arriving:
        unpack(with_corrections(items), arriving, done.append)
    assert done == list(range(1, 17))
    unpacked = tree(tmp_path / "outputs" / "cache" / "media")
    bytes_of = entries(tmp_path)
    shutil.rmtree(tmp_path / "outputs")
    ingest(tmp_path)
    assert entries(tmp_path) == bytes_of
    assert tree(tmp_path / "outputs" / "cache" / "media").keys() == unpacked.keys()
    place = store.path("media", key_of(items[0]))
    place.chmod(0o644)
    place.write_bytes(b"damaged")
    for anew in ((), (key_of(items[0]),)):
        with BulkWriter(store, "media", "a.zip", replace=anew) as arriving:
            unpack(with_corrections(items), arriving, done.append)
        assert (entries(tmp_path) == bytes_of) == bool(anew)


# Unpacking tells an archive that changed since, and keeps nothing of it.
def test_unpacking_checks_what_it_reads(tmp_path: Path, captured: BulkWriter) -> None:
    zipped(tmp_path / "m.zip")
    items = ingest(tmp_path, dry=True).media
    zipped(tmp_path / "m.zip", pictures=1, clips=0)
    make_image(tmp_path / "made" / "p0.png", (9, 9))
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.write(tmp_path / "made" / "p0.png", "p0.png")
    first = next(item for item in items if item.name == "p0.png")
    with pytest.raises(UserError, match="has changed since"):
        unpack(with_corrections([first]), captured, lambda _: None)
    with pytest.raises(UserError, match="can't be read"):
        unpack(
            with_corrections([item for item in items if item.name == "p1.png"]),
            captured,
            lambda _: None,
        )
    assert entries(tmp_path) == {}
