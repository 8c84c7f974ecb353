"""Weights in files of this computer: found by their paths, and hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from conftest import run_program
from hub_fetch import Notes

from runner.core.errors import StageError, UserError
from runner.hub.hub_cache import HubCache
from runner.hub.local_files import Hashes, existing_folder, existing_weights, is_local


class Reading(Notes):
    """A listener that knows how often bytes were read, and may act meanwhile."""

    def __init__(self, change: Path | None = None) -> None:
        super().__init__()
        self._change = change

    def checking(self, name: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.read.append(name)
        if self._change is not None:
            self._change.write_bytes(b"other")


# What a shell shows as a path is one; names of the hub's files are none.
def test_what_is_a_path() -> None:
    for path in ("/x.safetensors", "~/x.safetensors", "./x", "../x", "~user/x"):
        assert is_local(path)
    for name in ("vae/diffusion_pytorch_model.safetensors", "x.safetensors", "", ".x", "..x/y"):
        assert not is_local(name)


# A path that leads nowhere is one line with the nearest name there.
def test_a_missing_file_has_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "hunyuan_vae.safetensors").touch()
    (tmp_path / "vae" / "hunyuan_vae.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    found = existing_weights("model.vae", "./hunyuan_vae.safetensors", tmp_path / "vae")
    assert found == tmp_path / "vae" / "hunyuan_vae.safetensors"
    assert existing_weights("model.vae", "~/vae/hunyuan_vae.safetensors", Path("/")) == found
    lines = {
        "~/vae/hunyuanvae.safetensors": (
            ": there is no such file. Did you mean hunyuan_vae.safetensors?"
        ),
        "~/vea/x.safetensors": ": there is no such file.",
        "~/vae": " is a folder: give a file, or model.folder=~/vae.",
        "~/vae/hunyuan_vae.gguf": " is no .safetensors file, and no other is read.",
    }
    for text, line in lines.items():
        with pytest.raises(UserError) as error:
            existing_weights("model.vae", text, tmp_path)
        assert str(error.value) == f"model.vae={text}{line}"
    with pytest.raises(UserError, match=r"^model\.folder=vea: there is no such folder\. Did you"):
        existing_folder("model.folder", "vea", tmp_path)


# A file is read once; it is read again when it has been written again, even with the same size and
# modification time, and when another was put in its place.
def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    file, hashes = tmp_path / "w.safetensors", Hashes(tmp_path / "notes")
    file.write_bytes(b"first")
    assert hashes.known(file) is None
    listener = Reading()
    first = hashes.compute(file, listener)
    assert first == hashlib.sha256(b"first").hexdigest() == hashes.known(file)
    assert hashes.compute(file, listener) == first and len(listener.read) == 1
    assert hashes.compute(file, listener, again=True) == first and len(listener.read) == 2
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert hashes.known(link) == first
    stat = file.stat()
    with file.open("r+b") as handle:
        handle.write(b"secon")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and hashes.known(file) is None
    assert hashes.compute(file, listener) == hashlib.sha256(b"secon").hexdigest()
    other = tmp_path / "other"
    other.write_bytes(b"third")
    other.replace(file)
    assert hashes.known(file) is None


# A note that is damaged, or of a file that is gone, is no note.
def test_a_damaged_note_is_ignored(tmp_path: Path) -> None:
    file, hashes = tmp_path / "w.safetensors", Hashes(tmp_path / "notes")
    file.write_bytes(b"first")
    hashes.compute(file, Reading())
    (note,) = (tmp_path / "notes").iterdir()
    for text in ("", "[]", "{}", '{"identity": 1}'):
        note.write_text(text)
        assert hashes.known(file) is None
    file.unlink()
    assert hashes.known(file) is None


# Where no note can be written, the hash is returned all the same, and computed again next time.
def test_a_note_that_cannot_be_written(tmp_path: Path) -> None:
    file, notes = tmp_path / "w.safetensors", tmp_path / "notes"
    file.write_bytes(b"first")
    notes.touch()
    listener = Reading()
    for _ in range(2):
        assert Hashes(notes).compute(file, listener) == hashlib.sha256(b"first").hexdigest()
    assert len(listener.read) == 2


# A file of the hub's cache may be named as one of this computer: each keeps a note of its own.
def test_a_file_of_the_hubs_cache_has_two_notes(tmp_path: Path) -> None:
    blob, notes = tmp_path / "blob.safetensors", tmp_path / "notes"
    blob.write_bytes(b"first")
    HubCache(tmp_path / "hub", notes).remember(blob, "1" * 64)
    Hashes(notes).compute(blob, Reading())
    HubCache(tmp_path / "hub", notes).remember(blob, "2" * 64)
    assert Hashes(notes).known(blob) == hashlib.sha256(b"first").hexdigest()
    assert len(list(notes.iterdir())) == 2


# A network disk that is mounted again has another device number, and its files are not read again.
# A note names its file, for people.
def test_a_note_does_not_depend_on_the_device(tmp_path: Path) -> None:
    file, notes = tmp_path / "w.safetensors", tmp_path / "notes"
    file.write_bytes(b"first")
    Hashes(notes).compute(file, Reading())
    (path,) = notes.iterdir()
    note, stat = json.loads(path.read_text()), file.stat()
    assert note["file"] == str(file)
    assert sorted(note["identity"]) == sorted(
        [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    )


# The hash of a file that changes meanwhile is neither returned nor noted.
def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    file, hashes = tmp_path / "w.safetensors", Hashes(tmp_path / "notes")
    file.write_bytes(b"first one")
    with pytest.raises(StageError, match=r"w\.safetensors was changed while it was read"):
        hashes.compute(file, Reading(file))
    assert not (tmp_path / "notes").exists()


# By hand the command prints what sha256sum does, and fails in one line.
def test_the_command(tmp_path: Path) -> None:
    files = [tmp_path / "a b.safetensors", tmp_path / "c.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode())

    def command(*names: Path, force: bool = False) -> tuple[int, str, str]:
        words = ["--checked", str(tmp_path / "notes"), *["--force"] * force, "--"]
        words += map(str, names)
        done = run_program(*words, cwd=tmp_path, module="runner.hub.local_files")
        return done.code, done.out, done.err

    lines = [f"{hashlib.sha256(f.name.encode()).hexdigest()}  {f}\n" for f in files]
    assert command(*files) == (0, "".join(lines), "")
    assert Hashes(tmp_path / "notes").known(files[1]) == lines[1].split()[0]
    # A noted hash is printed as it is; with --force the file is read.
    for note in (tmp_path / "notes").iterdir():
        note.write_text(note.read_text().replace(lines[0].split()[0], "0" * 64))
    assert command(files[0])[1] == f"{'0' * 64}  {files[0]}\n"
    assert command(files[0], force=True)[1] == lines[0]
    gone = tmp_path / "gone.safetensors"
    assert command(gone) == (1, "", f"error: No such file or directory: {gone}\n")
