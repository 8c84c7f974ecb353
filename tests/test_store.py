"""The shared cache: entries are whole, named by content, made once and never changed."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP

from runner.atomic import write_text
from runner.store import Store, key_of, link


# A key depends on every part and on nothing else, not even on their order.
def test_keys_are_of_the_content() -> None:
    parts = {"media": "a", "bucket": [96, 64], "tile": 0}
    assert key_of(parts) == key_of(dict(reversed(parts.items())))
    for name, other in (("media", "b"), ("bucket", [64, 96]), ("tile", 128)):
        assert key_of({**parts, name: other}) != key_of(parts)


# A committed entry is read-only, says what made it, and leaves nothing behind.
def test_commit_moves_and_protects(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    made = tmp_path / "made"
    made.write_bytes(b"latents")
    place = store.commit("latents", "ab12.safetensors", made, {"media": "x"})
    assert place.read_bytes() == b"latents"
    assert stat.S_IMODE(place.stat().st_mode) == 0o444
    assert '"media": "x"' in place.with_name(place.name + ".json").read_text()
    assert not made.exists()
    assert store.has("latents", "ab12.safetensors")
    assert store.names() == {"latents/ab12.safetensors"}
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []


# An entry that is there is never replaced, whoever comes second.
def test_the_first_entry_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    for text in (b"first", b"second"):
        made = tmp_path / "made"
        made.write_bytes(text)
        place = store.commit("text", "ab.safetensors", made, {})
    assert place.read_bytes() == b"first"


# A half-written entry under a temporary name is not an entry.
def test_temporary_files_are_not_entries(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.path("latents", "ab.safetensors").parent
    folder.mkdir(parents=True)
    (folder / ".ab.safetensors.7.tmp").write_bytes(b"half")
    assert store.names() == frozenset()


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


# While one process holds a shelf another waits and says so; a dead holder's lock is taken over.
def test_locks_wait_and_survive_a_dead_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from runner.store import Store\n"
        "with Store(Path(sys.argv[1])).lock('latents', lambda: None):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited: list[str] = []

    def waiting() -> None:
        waited.append("waiting")
        holder.kill()
        holder.wait()

    with Store(tmp_path).lock("latents", waiting):
        pass
    assert waited == ["waiting"]
