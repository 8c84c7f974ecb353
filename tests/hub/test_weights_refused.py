"""What can't be had from a hub on loopback: reported in one line, before the first byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_fetch import (
    BIG,
    OTHER,
    TOKENS,
    WANTED,
    fetch,
    loopback_hub,
    outside,
    whole,
)
from hub_server import Hub

from runner.core.errors import StageError
from runner.hub import remote
from runner.hub.hub_cache import Request

__all__ = ("loopback_hub",)


# What can't be had is said in one line, before the first byte of any file, with what to do.
def test_gated(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/tokens"].gated = True
    with pytest.raises(StageError) as caught:
        fetch(tmp_path, WANTED, TOKENS)
    assert str(caught.value) == (
        f"owner/tokens is gated and no token is set: accept its terms at {hub.url}/owner/tokens, "
        "then log in with `hf auth login` or set HF_TOKEN."
    )
    assert hub.downloads() == []
    monkeypatch.setenv("HF_TOKEN", "hf_not_this_one_0123456789")
    with pytest.raises(StageError, match="the token in use does not open it") as caught:
        fetch(tmp_path, WANTED, TOKENS)
    assert "hf_not" not in str(caught.value)
    assert hub.downloads() == []


# A token opens what it may, goes to the hub and never to the content network behind it.
def test_token_stays_with_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "hf_let_me_in_0123456789"
    monkeypatch.setenv("HF_TOKEN", token)
    hub.repositories["owner/model"].gated = True
    hub.cuts["other.safetensors"] = [10]
    fetch(tmp_path)
    whole(tmp_path)
    assert all(
        bool(asked.authorization) == (not asked.path.startswith("/cdn/")) for asked in hub.asked
    )
    assert token not in "".join(capfd.readouterr())
    notes = "".join(path.read_text() for path in (tmp_path / "checked").iterdir())
    assert token not in notes


# A token that can't be sent at all is not shown either, and a wrong address is reported at once.
def test_unsendable(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for token in ("secret\0of_mine", "secretöf_mine"):
        (tmp_path / "token").write_text(token)
        with pytest.raises(StageError, match="the token in use has characters") as caught:
            fetch(tmp_path)
        assert "secret" not in str(caught.value)
    (tmp_path / "token").unlink()
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")
    with pytest.raises(StageError, match=r"hub.example can't be reached"):
        fetch(tmp_path)
    assert hub.asked == []


def test_missing_repository(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match=r"there is no repository owner/modle at .*no token is set"
    ):
        fetch(tmp_path, WANTED, Request("owner/modle", "main", ("a",)))
    assert hub.downloads() == []


def test_missing_file(hub: Hub, tmp_path: Path) -> None:
    request = Request("owner/model", "main", ("sub/bigg.safetensors",), option="model.revision")
    with pytest.raises(StageError) as caught:
        fetch(tmp_path, TOKENS, request)
    assert str(caught.value) == (
        "owner/model has no file sub/bigg.safetensors at model.revision=main. Did you mean "
        "sub/big.safetensors?"
    )
    assert hub.downloads() == []


def test_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    free = len(BIG) + len(OTHER) - 1
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StageError, match=r"2 files \(3.7 MB\) must .* only 3.7 MB are free"):
        fetch(tmp_path)
    assert hub.downloads() == []
    # What is here already needs no space.
    hub.cuts["sub/big.safetensors"] = [2_000_000] + [0] * remote.ATTEMPTS
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free + 1))
    with pytest.raises(StageError, match="kept"):
        fetch(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free // 2))
    fetch(tmp_path)
    whole(tmp_path)


# A disk that fills while a file comes is reported so, and what came is gone on from.
def test_disk_fills(hub: Hub, tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import errno, runner.hub.fetch as f; f._FULL += (errno.EFBIG,);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, 2_500_000));"
        "from runner.hub.__main__ import main; sys.exit(main())"
    )
    environment = outside(hub, tmp_path)
    command = [sys.executable, "-c", program, "owner/model", "--", *WANTED.files]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is full; what was downloaded is kept" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    fetch(tmp_path)
    whole(tmp_path)


# A hub that fails for a moment is asked again; one that can't be reached ends in one line.
def test_passing_failures(hub: Hub, tmp_path: Path) -> None:
    hub.failures = [500, 503]
    fetch(tmp_path)
    whole(tmp_path)
    hub.failures = [503] * remote.ATTEMPTS
    with pytest.raises(StageError, match="answers HTTP 503 for owner/tokens"):
        fetch(tmp_path, TOKENS)


def test_no_connection(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StageError, match=r"http://127.0.0.1:9 can't be reached \(.*\): check"):
        fetch(tmp_path)


# Offline, what is here is enough, and what is not is named; the network is not touched.
def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    fetch(tmp_path)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(fetch(tmp_path)) == 2
    assert len(fetch(tmp_path, force=True)) == 2
    with pytest.raises(StageError) as caught:
        fetch(tmp_path, WANTED, TOKENS)
    assert str(caught.value) == (
        f"HF_HUB_OFFLINE is set and the Hugging Face cache ({tmp_path}/hub) lacks tok/vocab.json "
        "of owner/tokens (main). Run once without it, or copy a cache that has them."
    )
    assert hub.asked == []
