"""The shared cache: entries are whole, named by content, made once and never changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import runner.storage.shared_cache
from runner.core.atomic import sync, write_text
from runner.storage import shared_cache as store_module
from runner.storage.shared_cache import (
    FinishedFile,
    Namespace,
    SharedCache,
    json_digest,
    link,
    note_of,
)


# A key depends on every part and on nothing else, not even on their order.
def test_keys_are_of_the_content() -> None:
    parts = {"media": "a", "bucket": [96, 64], "tile": 0}
    assert json_digest(parts) == json_digest(dict(reversed(parts.items())))
    for name, other in (("media", "b"), ("bucket", [64, 96]), ("tile", 128)):
        assert json_digest({**parts, name: other}) != json_digest(parts)


# A committed entry is read-only, says what made it, and leaves nothing behind.
def test_commit_moves_and_protects(tmp_path: Path) -> None:
    store = SharedCache(tmp_path / "cache")
    made = tmp_path / "made"
    made.write_bytes(b"latents")
    place = store.commit("latents", "ab12.safetensors", made, {"media": "x"})
    assert place.read_bytes() == b"latents"
    assert stat.S_IMODE(place.stat().st_mode) == 0o444
    assert '"media": "x"' in place.with_name(place.name + ".json").read_text()
    assert not made.exists()
    assert store.has("latents", "ab12.safetensors")
    assert store.full_keys() == {"latents/ab12.safetensors"}
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []


# An entry that is there is never replaced, whoever comes second.
def test_the_first_entry_stays(tmp_path: Path) -> None:
    store = SharedCache(tmp_path / "cache")
    for text in (b"first", b"second"):
        made = tmp_path / "made"
        made.write_bytes(text)
        place = store.commit("text", "ab.safetensors", made, {})
    assert place.read_bytes() == b"first"


# What a power cut could lose is on the disk in time: an entry's bytes and note before they have
# their names, and the names before the entry is said to be there.
def test_a_power_cut_leaves_whole_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    real_sync, real_rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        real_sync(descriptor)
        done.append(("synced", os.fstat(descriptor).st_ino))

    def renamed(self: Path, target: Path) -> Path:
        place = real_rename(self, target)
        done.append((f"renamed {target.suffix}", place.stat().st_ino))
        return place

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    place = full_key(SharedCache(tmp_path / "cache"), b"latents")
    entry, note = place.stat().st_ino, note_of(place).stat().st_ino
    folder = ("synced", place.parent.stat().st_ino)
    for name, inode in (("renamed .safetensors", entry), ("renamed .json", note)):
        assert done.index(("synced", inode)) < done.index((name, inode))
        assert folder in done[done.index((name, inode)) :]


# Files that are committed together are each as one that is committed alone, from another file
# system too, and all are synced before the first is named.
@pytest.mark.parametrize("other_disk", [False, True])
def test_files_are_committed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_disk: bool
) -> None:
    store, rename = SharedCache(tmp_path / "cache"), Path.replace
    made = [tmp_path / f"made{number}" for number in range(3)]
    for file in made:
        file.write_bytes(file.name.encode())
    store.commit("text", "a0", made[0], {})
    made[0].write_bytes(b"second")
    synced: list[int] = []
    monkeypatch.setattr(
        runner.storage.shared_cache, "sync", lambda p: synced.append(p.stat().st_ino)
    )

    def checked(self: Path, target: Path) -> Path:
        if other_disk and self.parent != target.parent:
            raise OSError("another file system")
        assert len(synced) == 4
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", checked)
    store.commit_all("text", [FinishedFile(f"a{n}", file, {"n": n}) for n, file in enumerate(made)])
    places = [store.path("text", f"a{n}") for n in range(3)]
    assert [place.read_bytes() for place in places] == [b"made0", b"made1", b"made2"]
    assert {stat.S_IMODE(place.stat().st_mode) for place in places} == {0o444}
    assert store.faults(["text/a0", "text/a1", "text/a2"], read=True) == {}
    assert set(synced[4:]) == {place.parent.stat().st_ino for place in places[1:]}
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert len([file for file in store.root.rglob("*") if file.is_file()]) == 6


# A half-written entry under a temporary name is not an entry.
def test_temporary_files_are_not_entries(tmp_path: Path) -> None:
    store = SharedCache(tmp_path)
    folder = store.path("latents", "ab.safetensors").parent
    folder.mkdir(parents=True)
    (folder / ".ab.safetensors.7.tmp").write_bytes(b"half")
    assert store.full_keys() == frozenset()


# Where links can't be made, the place gets a copy.
def test_link_falls_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.write_text("x")
    link(target, tmp_path / "a" / "linked")
    assert (tmp_path / "a" / "linked").is_symlink()

    def refuse(*_: object, **__: object) -> None:
        raise OSError("links are not supported here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link(target, tmp_path / "a" / "copied")
    assert not (tmp_path / "a" / "copied").is_symlink()
    assert (tmp_path / "a" / "copied").read_text() == "x"


# A failed write leaves the old text and no scraps.
def test_write_text_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    write_text(file, "old")

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with contextlib.suppress(OSError):
        write_text(file, "new")
    assert file.read_text() == "old"


def full_key(store: SharedCache, data: bytes, namespace: Namespace = "latents") -> Path:
    made = store.root.parent / "made"
    made.write_bytes(data)
    return store.commit(namespace, f"{data[:2].hex()}.safetensors", made, {"data": data[:2].hex()})


# The note of an entry has the size and the digest of its bytes, and what made it.
def test_the_note_tells_the_bytes(tmp_path: Path) -> None:
    place = full_key(SharedCache(tmp_path / "cache"), b"latents")
    assert json.loads(note_of(place).read_text()) == {
        "bytes": 7,
        "sha256": hashlib.sha256(b"latents").hexdigest(),
        "made_of": {"data": b"la".hex()},
    }


# Every kind of damage is found when bytes are read; at a glance only what shows in the size.
@pytest.mark.parametrize(
    ("damage", "glance", "fault"),
    [
        ("none", None, None),
        ("cut", "damaged", "damaged"),
        ("empty", "damaged", "damaged"),
        ("longer", "damaged", "damaged"),
        ("flipped", None, "damaged"),
        ("no note", "damaged", "damaged"),
        ("note cut", "damaged", "damaged"),
        ("note a list", "damaged", "damaged"),
        ("old note", "unchecked", "unchecked"),
        ("gone", "missing", "missing"),
        ("a folder", "missing", "missing"),
    ],
)
def test_damage_is_found(
    tmp_path: Path, damage: str, glance: str | None, fault: str | None
) -> None:
    store = SharedCache(tmp_path / "cache")
    data = os.urandom(3 << 20)
    place, other = full_key(store, data), full_key(store, b"other")
    note = note_of(place)
    place.chmod(0o644)
    if damage in ("cut", "empty", "longer", "flipped"):
        bit = bytes([data[-1] ^ 1])
        changed = {"cut": data[:-1], "empty": b"", "longer": data + b"x"}
        place.write_bytes(changed.get(damage, data[:-1] + bit))
    elif damage in ("no note", "gone"):
        (note if damage == "no note" else place).unlink()
    elif damage == "a folder":
        place.unlink()
    elif damage != "none":
        words = {"note cut": note.read_text()[:-9], "note a list": "[]", "old note": "{}"}
        note.write_text(words[damage])
    names = [f"latents/{place.name}", f"latents/{other.name}"]
    assert store.faults(names, read=False) == ({names[0]: glance} if glance else {})
    assert store.faults(names, read=True) == ({names[0]: fault} if fault else {})


# Damage that comes later is found too, by the same store: what was read is known by its file.
def test_damage_after_a_look_is_found(tmp_path: Path) -> None:
    store = SharedCache(tmp_path / "cache")
    place = full_key(store, b"latents")
    name = f"latents/{place.name}"
    assert store.faults([name], read=True) == {}
    place.chmod(0o644)
    place.write_bytes(b"LATENTS")
    # At another time, which the clock of a file system need not tell within a moment.
    os.utime(place, ns=(1, 1))
    assert store.faults([name], read=True) == {name: "damaged"}
    stored_again = tmp_path / "again"
    stored_again.write_bytes(b"latents")
    store.commit("latents", place.name, stored_again, {}, replace=True)
    assert store.faults([name], read=True) == {}


# An entry that another process replaces at the moment of the look is not taken for damaged.
def test_replacing_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SharedCache(tmp_path / "cache")
    place = full_key(store, b"latents")
    name = f"latents/{place.name}"
    assert store.faults([name], read=True) == {}
    new = tmp_path / "new"
    new.write_bytes(b"new latents")
    old = place.read_bytes()
    store.commit("latents", place.name, new, {}, replace=True)
    place.rename(tmp_path / "replaced")
    place.write_bytes(old)
    # While the store waits before it looks once more, the other process gets to its end.
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "replaced").rename(place))
    assert store.faults([name], read=True) == {}
    assert place.read_bytes() == b"new latents"


# Each file is read once in a run, however often the run looks.
def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SharedCache(tmp_path / "cache")
    names = [f"latents/{full_key(store, bytes([n] * 9)).name}" for n in range(20)]
    read: list[Path] = []
    real = runner.storage.shared_cache.digest_of

    def watched(file: Path) -> str:
        read.append(file)
        return real(file)

    monkeypatch.setattr(runner.storage.shared_cache, "digest_of", watched)
    seen: list[tuple[int, int]] = []
    for _ in range(3):
        assert store.faults(names, read=True, progress=lambda *at: seen.append(at)) == {}
    assert len(read) == 20
    assert seen[-1] == (180, 180)
    assert len(seen) == 20


# Entries are read at a gigabyte a second and more: each byte of them once, in pieces so large that
# nothing but the disk and the digest takes time.
def test_reading_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(8 << 20)
    name = f"latents/{full_key(SharedCache(tmp_path / 'cache'), data).name}"
    pieces: list[int] = []
    real = hashlib.sha256

    class Counting:
        """A digest that notes how much it is given at a time."""

        def __init__(self) -> None:
            self._digest = real()

        def update(self, piece: Any) -> None:
            pieces.append(len(piece))
            self._digest.update(piece)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counting)
    assert SharedCache(tmp_path / "cache").faults([name], read=True) == {}
    assert sum(pieces) == len(data)
    assert len(pieces) <= 8


# And several of them at once, also where there is but one core: the disk can do more.
def test_entries_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        f"latents/{full_key(SharedCache(tmp_path / 'cache'), bytes([n] * 9)).name}"
        for n in range(2)
    ]
    # Each waits until the other is being read too.
    both = threading.Barrier(2, timeout=60)
    real = runner.storage.shared_cache.digest_of

    def waiting(file: Path) -> str:
        both.wait()
        return real(file)

    monkeypatch.setattr(runner.storage.shared_cache, "digest_of", waiting)
    assert SharedCache(tmp_path / "cache").faults(names, read=True) == {}


# Nothing but the file itself ever lies where it was made: an engine that is still at work there
# deletes what it does not know, and a commit must not fail by it.
def test_a_commit_leaves_the_engines_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "staging" / "made.safetensors"
    made.parent.mkdir()
    made.write_bytes(b"made")
    seen: list[list[str]] = []

    def noted(path: Path) -> None:
        seen.append([file.name for file in made.parent.iterdir()])
        sync(path)

    monkeypatch.setattr(store_module, "sync", noted)
    store = SharedCache(tmp_path / "cache")
    store.commit("text", "ab", made, {})
    assert seen == [[made.name], [made.name], []]
    assert sorted(file.name for file in store.path("text", "ab").parent.iterdir()) == [
        "ab",
        "ab.json",
    ]
