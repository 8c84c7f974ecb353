"""What the tests of fetching share: two small repositories on a hub, and a watcher that notes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import TOP
from hub_server import Hub, Repository, serve, talk_to

from runner.hub.fetch import FetchedFile, fetch_files
from runner.hub.hub_cache import HubCache, Request

COMMIT, NEWER = "a" * 40, "b" * 40
BIG = random.Random(1).randbytes(3_000_000)
OTHER = random.Random(2).randbytes(700_000)
SMALL = b'{"a": 1}'
WANTED = Request(
    "owner/model", "main", ("sub/big.safetensors", "other.safetensors"), option="model.revision"
)
TOKENS = Request(
    "owner/tokens", "main", ("tok/vocab.json",), ("tok/*",), branch="main", option="tokens"
)


class Notes:
    """Takes down what a watcher is reported."""

    def __init__(self) -> None:
        self.todo: list[tuple[str, int, int]] = []
        self.lines: list[str] = []
        self.files: list[str] = []
        self.read: list[str] = []

    def begin(self, todo: Sequence[tuple[str, int, int]]) -> None:
        self.todo = list(todo)

    def bytes(self, number: int, done: int) -> None:
        assert 0 <= done <= self.todo[number][1]

    def checking(self, name: str, done: int, total: int) -> None:
        if done == total:
            self.read.append(name)

    def brought(self, number: int) -> None:
        self.files.append(self.todo[number][0])

    def line(self, text: str) -> None:
        self.lines.append(text)


def repositories() -> dict[str, Repository]:
    return {
        "owner/model": Repository(
            {"sub/big.safetensors": BIG, "other.safetensors": OTHER, "unwanted.safetensors": BIG},
            COMMIT,
        ),
        "owner/tokens": Repository(
            {
                "tok/vocab.json": SMALL,
                "tok/extra.json": b"[]",
                "tok/deep/no.json": b"1",
                "README.md": b"x",
            },
            COMMIT,
        ),
    }


@pytest.fixture(name="hub")
def loopback_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the repositories above, an empty cache, and no token."""
    with serve(Hub(repositories())) as served:
        talk_to(served, tmp_path, monkeypatch)
        yield served


def cache(tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "hub", tmp_path / "checked")


def fetch(
    tmp_path: Path, *requests: Request, force: bool = False, notes: Notes | None = None
) -> list[FetchedFile]:
    return fetch_files(requests or (WANTED,), cache(tmp_path), notes or Notes(), force=force)


def whole(tmp_path: Path) -> None:
    """Every wanted file is where other clients of the hub look for it, with its own bytes."""
    from huggingface_hub import hf_hub_download

    for file, content in (("sub/big.safetensors", BIG), ("other.safetensors", OTHER)):
        path = hf_hub_download(
            "owner/model",
            file,
            revision="main",
            cache_dir=tmp_path / "hub",
            local_files_only=True,
        )
        assert Path(path).read_bytes() == content


def outside(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a program that talks to ``hub``, with the same cache."""
    return {
        **os.environ,
        "PYTHONPATH": str(TOP),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path),
    }
