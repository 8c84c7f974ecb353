"""Weights from a hub on loopback: fetched, cut, damaged, shared."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_fetch import (
    BIG,
    COMMIT,
    NEWER,
    OTHER,
    SMALL,
    TOKENS,
    WANTED,
    Notes,
    cache,
    fetch,
    loopback_hub,
    outside,
    whole,
)
from hub_server import Hub

from runner.core.errors import StageError
from runner.hub import remote
from runner.hub.fetch import fetch_files
from runner.hub.hub_cache import Request

__all__ = ("loopback_hub",)


# A fresh machine gets the wanted files and no others, once, and what came is reported with its
# commit.
def test_fresh_download(hub: Hub, tmp_path: Path) -> None:
    notes = Notes()
    found = fetch(tmp_path, WANTED, TOKENS, notes=notes)
    whole(tmp_path)
    assert [file.file for file in found] == [
        "other.safetensors",
        "sub/big.safetensors",
        "tok/extra.json",
        "tok/vocab.json",
    ]
    big = found[1]
    assert (big.repository, big.revision, big.commit) == ("owner/model", "main", COMMIT)
    assert (big.size, big.sha256) == (len(BIG), hashlib.sha256(BIG).hexdigest())
    assert found[3].sha256 == hashlib.sha256(SMALL).hexdigest()
    assert hub.sent("big.safetensors") == len(BIG)
    assert sum(a.sent for a in hub.asked) == sum(file.size for file in found)
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    # The required file of the tokenizer comes after the optional ones: a cut leaves it missing.
    assert notes.files[-2:] == ["tok/extra.json", "tok/vocab.json"]


# A download has its final name only when its bytes are on the disk, so that a power cut leaves a
# whole file or one to go on with.
def test_a_download_is_synced_before_it_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[tuple[int, int]] = set()
    named: list[bool] = []
    real_sync, real_rename = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        stat = os.fstat(descriptor)
        synced.add((stat.st_ino, stat.st_size))

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".incomplete":
            stat = self.stat()
            named.append((stat.st_ino, stat.st_size) in synced)
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    fetch(tmp_path)
    whole(tmp_path)
    assert named == [True, True]


# When all is here and was read once, the hub is asked nothing and no file is read again, for a
# branch as for a commit.
def test_second_run_is_silent(hub: Hub, tmp_path: Path) -> None:
    first = fetch(tmp_path, WANTED, TOKENS)
    hub.asked.clear()
    notes = Notes()
    assert fetch(tmp_path, WANTED, TOKENS, notes=notes) == first
    pinned = Request("owner/model", COMMIT, WANTED.files)
    assert [f.sha256 for f in fetch(tmp_path, pinned)] == [f.sha256 for f in first[:2]]
    assert hub.asked == [] and notes.read == [] and notes.lines == []


# With stages.force the hub is asked where the branch is now, every file is read again, and only
# the bytes that differ are fetched.
def test_force_follows_the_branch(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    repository = hub.repositories["owner/model"]
    repository.commit = NEWER
    repository.files["other.safetensors"] = b"newer"
    hub.asked.clear()
    assert fetch(tmp_path)[0].commit == COMMIT
    notes = Notes()
    found = fetch(tmp_path, force=True, notes=notes)
    assert {file.commit for file in found} == {NEWER}
    assert found[0].path.read_bytes() == b"newer"
    assert sum(a.sent for a in hub.asked) == len(b"newer")
    assert len(notes.read) == 3


# A revision given as a commit is what is fetched, whatever the branch points at.
def test_revision_pinned_by_commit(hub: Hub, tmp_path: Path) -> None:
    found = fetch(tmp_path, Request("owner/model", COMMIT, WANTED.files, branch="main"))
    assert {file.commit for file in found} == {COMMIT}
    assert (tmp_path / "hub/models--owner--model/refs/main").read_text() == COMMIT
    with pytest.raises(StageError, match=r"has no branch, tag or commit cccc.*model.revision"):
        fetch(tmp_path, Request("owner/model", "c" * 40, WANTED.files, option="model.revision"))


# A download cut anywhere goes on from there, however often: what arrived is never sent again.
@pytest.mark.parametrize(
    "cuts", [[1], [100_000], [1_000_000, 900_000, 1], [2_999_999], [90_000] * 50]
)
def test_cut_connection_goes_on(hub: Hub, tmp_path: Path, cuts: list[int]) -> None:
    hub.cuts["sub/big.safetensors"] = list(cuts)
    fetch(tmp_path)
    whole(tmp_path)
    assert hub.sent("big.safetensors") == len(BIG)


# A run that gives up keeps what came, and the next run goes on from it.
def test_next_run_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.cuts["sub/big.safetensors"] = [2_000_000] + [0] * remote.ATTEMPTS
    with pytest.raises(StageError, match="kept"):
        fetch(tmp_path)
    sent = hub.sent("big.safetensors")
    notes = Notes()
    fetch(tmp_path, notes=notes)
    whole(tmp_path)
    (part,) = [part for name, _, part in notes.todo if name == "sub/big.safetensors"]
    assert part == 2_000_000
    assert hub.sent("big.safetensors") - sent == len(BIG) - part
    assert hub.asked[-1].range == f"bytes={part}-"


# A run that is killed outright loses only what was on its way, and another program's half is gone
# on from.
def test_killed_run_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_per_piece = 0.02
    command = [sys.executable, "-m", "runner.hub", "owner/model", "--", *WANTED.files]
    environment = outside(hub, tmp_path)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while hub.sent("big.safetensors") < 2_500_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = (tmp_path / "hub").rglob("*.incomplete")
    have = partial.stat().st_size
    # What was still on its way depends on the machine.
    assert have >= 1 << 20
    hub.seconds_per_piece = 0
    hub.asked.clear()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.sent("big.safetensors") == len(BIG) - have
    assert f"({have / 1e6:.1f} MB of it is here)" in done.stdout
    whole(tmp_path)


# A hub that ignores ranges, or lost the file's end, costs a new start and never a wrong file.
def test_hub_without_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.no_ranges = True
    hub.cuts["sub/big.safetensors"] = [1_000_000]
    found = fetch(tmp_path)
    whole(tmp_path)
    assert [file.sha256 for file in found if file.file == "sub/big.safetensors"] == [
        hashlib.sha256(BIG).hexdigest()
    ]
    assert hub.sent("big.safetensors") == 1_000_000 + len(BIG)


# Wrong bytes of the right size are found and fetched again; wrong twice, nothing of them is kept.
def test_wrong_bytes(hub: Hub, tmp_path: Path) -> None:
    wrong = bytes(len(BIG))
    hub.lies["sub/big.safetensors"] = [wrong]
    hub.lies["tok/vocab.json"] = [b'{"a": 2}']
    notes = Notes()
    fetch(tmp_path, WANTED, TOKENS, notes=notes)
    whole(tmp_path)
    assert [line.split()[0] for line in notes.lines] == ["sub/big.safetensors", "tok/vocab.json"]


def test_wrong_bytes_twice(hub: Hub, tmp_path: Path) -> None:
    wrong = bytes(len(BIG))
    hub.lies["sub/big.safetensors"] = [wrong, wrong]
    with pytest.raises(StageError, match="downloaded twice, and neither copy matches") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    names = [path.name for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert hashlib.sha256(BIG).hexdigest() not in names
    assert not any(name.endswith(".incomplete") for name in names)


# A partial file whose beginning is wrong costs one download more, and is never taken for the file.
def test_damaged_partial(hub: Hub, tmp_path: Path) -> None:
    partial = tmp_path / "hub/models--owner--model/blobs" / hashlib.sha256(BIG).hexdigest()
    partial.parent.mkdir(parents=True)
    partial.with_name(partial.name + ".incomplete").write_bytes(bytes(1_000_000))
    fetch(tmp_path)
    whole(tmp_path)
    assert hub.sent("big.safetensors") == 2 * len(BIG) - 1_000_000


# Sizes that don't agree: too few or too many bytes end in one line, a lying head before any byte.
def test_wrong_sizes(hub: Hub, tmp_path: Path) -> None:
    hub.lies["sub/big.safetensors"] = [BIG[:1000]] * 20
    with pytest.raises(StageError, match="gives only 1000 of the 3000000 bytes"):
        fetch(tmp_path)
    hub.lies["sub/big.safetensors"] = [BIG + b"more"]
    with pytest.raises(StageError, match="more than the 3000000 bytes"):
        fetch(tmp_path)
    hub.asked.clear()
    hub.head_sizes["unwanted.safetensors"] = 5
    with pytest.raises(StageError, match="listed with 3000000 bytes and offered with 5"):
        fetch(tmp_path, Request("owner/model", "main", ("unwanted.safetensors",)))
    assert hub.downloads() == []


# A damaged file that lies in the user's cache is found at the first run, and again whenever its
# size or time has changed; it is replaced.
def test_damaged_cache(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    blob = (tmp_path / "hub/models--owner--model/blobs") / hashlib.sha256(OTHER).hexdigest()
    blob.chmod(0o644)
    blob.write_bytes(bytes(len(OTHER)))
    os.utime(blob, ns=(1, 1))
    hub.asked.clear()
    notes = Notes()
    fetch(tmp_path, notes=notes)
    whole(tmp_path)
    assert "damaged" in notes.lines[0]
    assert hub.sent("big.safetensors") == 0 and hub.sent("other.safetensors") == len(OTHER)


# What another client put into the cache is used and not fetched again.
def test_cache_is_shared(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("owner/model", "sub/big.safetensors", cache_dir=tmp_path / "hub")
    hub.asked.clear()
    notes = Notes()
    fetch(tmp_path, notes=notes)
    whole(tmp_path)
    assert hub.sent("big.safetensors") == 0
    assert notes.read[0] == "sub/big.safetensors of owner/model"


# Two runs at once fetch each byte once, and both end with everything.
def test_two_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_per_piece = 0.02
    command = [sys.executable, "-m", "runner.hub", "owner/model", "--", *WANTED.files]
    environment = outside(hub, tmp_path)
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [(p.communicate(), p.returncode)[1] for p in processes] == [0, 0]
    whole(tmp_path)
    assert sum(a.sent for a in hub.asked) == len(BIG) + len(OTHER)


# Where the file system has no links the files lie in the snapshot, and are found and checked there.
def test_without_links(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    found = fetch(tmp_path)
    assert [file.path.read_bytes() for file in found] == [OTHER, BIG]
    assert not found[0].path.is_symlink()
    hub.asked.clear()
    assert fetch(tmp_path) == found
    assert hub.asked == []


# A blob can be a link into a store that the cache's repositories share; its etag is still known.
def test_shared_store(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    blob = (tmp_path / "hub/models--owner--model/blobs") / hashlib.sha256(BIG).hexdigest()
    shared = tmp_path / "hub/blobs/00" / ("0" * 64)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    found = cache(tmp_path).find("owner/model", COMMIT, "sub/big.safetensors")
    assert found is not None and found.etag == hashlib.sha256(BIG).hexdigest()
    hub.asked.clear()
    assert fetch(tmp_path)[1].sha256 == hashlib.sha256(BIG).hexdigest()
    assert hub.asked == []


# The bar counts bytes of all files, from those that were here, with speed and time left.
def test_progress_in_a_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from runner.core import console
    from runner.hub.progress import DownloadProgress

    hub.cuts["other.safetensors"] = [500_000] + [0] * remote.ATTEMPTS
    with pytest.raises(StageError):
        fetch(tmp_path)
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    hub.seconds_per_piece = 0.005
    with DownloadProgress(console.Console.for_stream(out)) as shown:
        fetch_files([WANTED], cache(tmp_path), shown)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("      2 files to fetch, 3.7 MB (")
    assert "other.safetensors  700.0 kB" in "\n".join(lines)
    moving = [line for line in lines if "sub/big.safetensors" in line and "/s" in line]
    assert moving and any(line.endswith("left") for line in moving)
    assert lines[-1].startswith("      fetched 3.7 MB of 3.7 MB")
