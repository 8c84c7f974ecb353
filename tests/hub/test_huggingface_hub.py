"""What huggingface_hub does by itself, beside what the runner does: docs/development/hub.md.

Where a test fails because a newer version does more by itself, code of ours can go.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import TOP
from hub_fetch import BIG, COMMIT, OTHER, SMALL, TOKENS, WANTED, fetch, loopback_hub, outside, whole
from hub_server import Hub
from huggingface_hub import close_session, constants, errors, hf_hub_download
from huggingface_hub import try_to_load_from_cache as try_to_load

from runner.core.errors import StageError
from runner.hub.hub_cache import Request

__all__ = ("loopback_hub",)

FILE = "sub/big.safetensors"
SHA256 = hashlib.sha256(BIG).hexdigest()


def alone(tmp_path: Path, file: str = FILE, **options: Any) -> Path:
    """A file of the hub as the library has it, in the same cache."""
    return Path(hf_hub_download("owner/model", file, cache_dir=tmp_path / "hub", **options))


def kept(tmp_path: Path) -> list[int]:
    """The sizes of what lies in the cache."""
    return sorted(p.stat().st_size for p in (tmp_path / "hub").rglob("blobs/*"))


# A cut costs the piece of 10 MB that was on its way, and five such cuts in a row cost everything.
def test_cut_connection(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[FILE] = [1_000_000]
    assert alone(tmp_path).read_bytes() == BIG
    assert hub.sent("big.safetensors") == 1_000_000 + len(BIG)
    hub.cuts["other.safetensors"] = [90_000] * 8
    with pytest.raises(Exception, match="peer closed connection"):
        alone(tmp_path, "other.safetensors")
    assert kept(tmp_path) == [len(BIG)]
    hub.asked.clear()
    fetch(tmp_path)
    assert hub.sent("other.safetensors") == len(OTHER)


# A process that is killed leaves a file under a name of its own, which nothing goes on from.
def test_killed_process(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_per_piece = 0.02
    program = f"import huggingface_hub as h; h.hf_hub_download('owner/model', '{FILE}')"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, env=outside(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while hub.sent("big.safetensors") < 2_000_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    (left,) = (tmp_path / "hub").rglob("*.incomplete")
    assert left.name != f"{SHA256}.incomplete"
    hub.seconds_per_piece = 0
    hub.asked.clear()
    alone(tmp_path)
    assert hub.sent("big.safetensors") == len(BIG)
    assert left.exists()


# Bytes are not compared with the digest that the hub names, when they come or ever after.
def test_wrong_bytes_and_damage(hub: Hub, tmp_path: Path) -> None:
    hub.lies[FILE] = [bytes(len(BIG))]
    assert alone(tmp_path).read_bytes() != BIG
    assert alone(tmp_path).read_bytes() != BIG
    fetch(tmp_path)
    whole(tmp_path)


# A head that names another digest gives the file that name; ours goes by the list of files.
def test_wrong_etag(hub: Hub, tmp_path: Path) -> None:
    hub.etags[FILE] = "e" * 64
    assert alone(tmp_path).resolve().name == "e" * 64
    other = tmp_path / "other"
    fetch(other)
    whole(other)
    assert (other / "hub/models--owner--model/blobs" / SHA256).is_file()


# Sizes are compared, after the last byte, in two lines that send people to an option of Python's.
@pytest.mark.parametrize("sent", [BIG[:1000], BIG + b"more", b"<html>Sorry</html>"])
def test_wrong_sizes(hub: Hub, tmp_path: Path, sent: bytes) -> None:
    hub.lies[FILE] = [sent]
    with pytest.raises(OSError, match="Consistency check failed") as caught:
        alone(tmp_path)
    assert "\n" in str(caught.value) and "force_download=True" in str(caught.value)
    assert kept(tmp_path) == []
    hub.lies[FILE] = [sent]
    if len(sent) < len(BIG):
        fetch(tmp_path)  # goes on until all is there, and fetches it again when it is wrong
        whole(tmp_path)
    else:
        with pytest.raises(StageError, match="sends more than the 3000000 bytes that it names"):
            fetch(tmp_path)


# A size that the head has wrong is found after the last byte too; ours looks before the first.
def test_lying_head(hub: Hub, tmp_path: Path) -> None:
    hub.head_sizes[FILE] = 5
    with pytest.raises(OSError, match="Consistency check failed"):
        alone(tmp_path)
    assert hub.sent("big.safetensors") == len(BIG)
    hub.asked.clear()
    with pytest.raises(StageError, match="offered with 5"):
        fetch(tmp_path, Request("owner/model", "main", (FILE,)))
    assert hub.downloads() == []


# Its errors have kinds that can be distinguished, and several lines each; the second repository's
# come when the first was fetched.
def test_refusals(hub: Hub, tmp_path: Path) -> None:
    def refused(kind: type[Exception], repository: str, file: str, **options: Any) -> None:
        with pytest.raises(kind) as caught:
            hf_hub_download(repository, file, cache_dir=tmp_path / "hub", **options)
        assert len(str(caught.value).splitlines()) > 1

    alone(tmp_path, "other.safetensors")
    assert hub.downloads()
    hub.repositories["owner/tokens"].gated = True
    refused(errors.GatedRepoError, "owner/tokens", "tok/vocab.json")
    refused(errors.RepositoryNotFoundError, "owner/modle", FILE)
    refused(errors.RevisionNotFoundError, "owner/model", FILE, revision="c" * 40)
    refused(errors.EntryNotFoundError, "owner/model", "sub/bigg.safetensors")
    hub.asked.clear()
    with pytest.raises(StageError, match="owner/tokens is gated"):
        fetch(tmp_path, WANTED, TOKENS)
    assert hub.downloads() == []


# The token goes to the hub alone; one that can't be sent is in the error.
def test_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_let_me_in_0123456789")
    hub.repositories["owner/model"].gated = True
    alone(tmp_path)
    assert all(bool(a.authorization) != a.path.startswith("/cdn/") for a in hub.asked if a.sent)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("secret\0of_mine")
    with pytest.raises(Exception, match="secret"):
        alone(tmp_path, "other.safetensors")
    with pytest.raises(StageError, match="the token in use has characters") as caught:
        fetch(tmp_path)
    assert "secret" not in str(caught.value)


# A disk without room is a warning, and the download begins.
def test_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert alone(tmp_path).read_bytes() == BIG
    assert "Not enough free disk space" in str(caught[0].message)
    with pytest.raises(StageError, match=r"only 1\.0 kB are free"):
        fetch(tmp_path)
    assert hub.sent("other.safetensors") == 0


# Offline, and where the hub can't be reached, what is here is given; what is not is not named.
def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = alone(tmp_path)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert alone(tmp_path) == there
    with pytest.raises(errors.LocalEntryNotFoundError, match="check your connection") as caught:
        alone(tmp_path, "other.safetensors")
    assert "other.safetensors" not in str(caught.value)
    with pytest.raises(StageError, match=r"HF_HUB_OFFLINE is set .* lacks other\.safetensors"):
        fetch(tmp_path)
    assert hub.asked == []


# A hub that ignores ranges is noticed, by the library as by ours.
def test_ranges_ignored(hub: Hub, tmp_path: Path) -> None:
    hub.no_ranges = True
    hub.cuts[FILE] = [1_000_000]
    assert alone(tmp_path).read_bytes() == BIG
    hub.cuts["other.safetensors"] = [500_000]
    fetch(tmp_path)
    whole(tmp_path)


# Where the hub offers Xet the library takes that and nothing else: a storage that can't be reached
# or lacks the file ends the download in an error of no kind. Ours takes the hub's own bytes, as the
# library does with HF_HUB_DISABLE_XET=1.
def test_xet(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.xet = True
    with pytest.raises(RuntimeError, match="CAS Client Error"):
        alone(tmp_path)
    assert kept(tmp_path) == [] and hub.downloads() == []
    hub.asked.clear()
    fetch(tmp_path)
    whole(tmp_path)
    assert not any("xet" in asked.path or "reconstructions" in asked.path for asked in hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert alone(tmp_path, "unwanted.safetensors").read_bytes() == BIG


# A commit is fetched once and then not asked for; it leaves no branch behind, which programs that
# ask for main offline need. A branch's damaged note is an error until somebody removes it.
def test_revisions(hub: Hub, tmp_path: Path) -> None:
    there = alone(tmp_path, revision=COMMIT)
    main = tmp_path / "hub/models--owner--model/refs/main"
    hub.asked.clear()
    assert alone(tmp_path, revision=COMMIT) == there
    assert hub.asked == [] and not main.exists()
    alone(tmp_path)
    assert main.read_text() == COMMIT
    main.write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(UnicodeDecodeError):
        try_to_load("owner/model", FILE, cache_dir=tmp_path / "hub")
    with pytest.raises(UnicodeDecodeError):
        alone(tmp_path)
    fetch(tmp_path)
    whole(tmp_path)


# Two processes at once fetch a file once: they hold the lock that ours holds too.
def test_two_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_per_piece = 0.01
    program = f"import huggingface_hub as h; h.hf_hub_download('owner/model', '{FILE}')"
    environment = {**outside(hub, tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ours = [sys.executable, "-m", "runner.hub", "owner/model", FILE]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        for command in ([sys.executable, "-c", program], ours)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert hub.sent("big.safetensors") == len(BIG)


# Without links the bytes lie in the snapshot, where either finds what the other has fetched; a blob
# that was there before is copied by the library, and lies there twice.
def test_without_links(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(tmp_path, "unwanted.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    assert not alone(tmp_path).is_symlink()
    fetch(tmp_path)
    whole(tmp_path)
    assert not alone(tmp_path, "other.safetensors").is_symlink()
    assert hub.sent("other.safetensors") == len(OTHER)
    assert kept(tmp_path) == [len(BIG)]


# A hub that fails for a moment is asked again for a head, and not for bytes.
def test_failures_that_pass(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [500]
    alone(tmp_path, "other.safetensors")
    hub.refused = [503]
    with pytest.raises(errors.HfHubHTTPError):
        alone(tmp_path)
    hub.refused = [503]
    fetch(tmp_path)
    whole(tmp_path)


# A network that answers with a page of its own: by its missing headers the library knows it.
def test_a_page_for_people(hub: Hub, tmp_path: Path) -> None:
    hub.portal = True
    with pytest.raises(errors.LocalEntryNotFoundError, match="firewall and proxy settings"):
        alone(tmp_path)
    with pytest.raises(StageError, match="does not answer as a hub does") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)


# A proxy of the environment is used, which ours gets from the library.
def test_proxy(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    close_session()
    try:
        there = hf_hub_download("owner/tokens", "tok/vocab.json", cache_dir=tmp_path / "hub")
        assert Path(there).read_bytes() == SMALL
        hub.asked.clear()
        found = fetch(tmp_path / "other", TOKENS)
    finally:
        close_session()
    assert found[-1].path.read_bytes() == SMALL
    assert {asked.host for asked in hub.asked} == {"hub.invalid"}


# A bar is of one file, and is not aware of what other files are still to come.
def test_progress(hub: Hub, tmp_path: Path) -> None:
    from tqdm.auto import tqdm

    totals: list[float] = []

    class Bar(tqdm):  # type: ignore[misc, type-arg]
        def __init__(self, *given: Any, **options: Any) -> None:
            options.pop("name", None)
            totals.append(options["total"])
            super().__init__(*given, **{**options, "disable": True})

    for file in (FILE, "other.safetensors"):
        alone(tmp_path, file, tqdm_class=Bar)
    assert totals == [len(BIG), len(OTHER)]


# A download is renamed before its bytes are on the disk: a power cut can leave a name without them.
def test_power_cut(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    alone(tmp_path)
    assert synced == []
    fetch(tmp_path)
    assert len(OTHER) in synced


# The page's rows name tests that there are, and the version that was tested.
def test_the_table_is_true() -> None:
    page = (TOP / "docs/development/hub.md").read_text("utf-8")
    assert f"huggingface_hub {version('huggingface_hub')}" in page
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = {
        name
        for file in (TOP / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    }
    assert named <= tests
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text("utf-8"), re.MULTILINE))
    assert here - named == {"test_the_table_is_true"}
