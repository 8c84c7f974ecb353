"""A Hugging Face hub on loopback, which can be made to misbehave.

It answers what huggingface_hub asks: a repository's files at a revision, the head of a file, and
its bytes with ranges. A dataset is named as its page is, "datasets/owner/name". Large (LFS) files
are redirected to another host name, as the hub does to its content network.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


def git_id(content: bytes) -> str:
    """The name git gives to a file's bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Files of one commit, and the branches that point at it."""

    files: dict[str, bytes]
    commit: str
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    small: tuple[str, ...] = (".json", ".txt", ".jinja")

    def is_lfs(self, file: str) -> bool:
        return not file.endswith(self.small)

    def etag(self, file: str) -> str:
        content = self.files[file]
        return hashlib.sha256(content).hexdigest() if self.is_lfs(file) else git_id(content)


@dataclass
class Asked:
    """One request, and the bytes of a file that went out in answer."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str
    sent: int = 0


@dataclass
class Hub:
    """What is served, how it misbehaves, and what was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    # For a file: cut the connection after so many bytes, once for each number.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    # For a file: serve these bytes in place of its own, once for each.
    lies: dict[str, list[bytes]] = field(default_factory=dict)
    # For a file: the size that its head names.
    head_sizes: dict[str, int] = field(default_factory=dict)
    # Answer so many requests with this status first.
    failures: list[int] = field(default_factory=list)
    # Answer so many downloads with this status first.
    refused: list[int] = field(default_factory=list)
    # Answer everything with a page for people, as a network does that wants a login first.
    portal: bool = False
    no_ranges: bool = False
    # Offer large files by Xet too, from a storage that has none of them.
    xet: bool = False
    # For a file: the digest that its head names.
    etags: dict[str, str] = field(default_factory=dict)
    seconds_per_piece: float = 0.0
    piece: int = 1 << 16
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    port: int = 0

    def sent(self, file: str) -> int:
        """Bytes of a file that went out, all answers together."""
        return sum(a.sent for a in self.asked if a.path.endswith(file))

    def downloads(self) -> list[Asked]:
        return [a for a in self.asked if a.sent]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = Asked(
            self.command,
            path,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.headers.get("Host", ""),
        )
        self.hub.asked.append(asked)
        if self.hub.portal:
            self._end(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
        elif self.hub.failures:
            self._end(self.hub.failures.pop(0))
        elif "/xet-read-token/" in path:
            self._end(
                200,
                {
                    "X-Xet-Cas-Url": self.hub.url,
                    "X-Xet-Access-Token": "xet",
                    "X-Xet-Token-Expiration": "9999999999",
                },
            )
        elif path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
        elif path.startswith("/api/datasets/"):
            self._info("datasets/" + path.removeprefix("/api/datasets/"))
        elif path.startswith("/cdn/"):
            repository, _, file = path.removeprefix("/cdn/").partition("/resolve/")
            self._send(self.hub.repositories[repository], file, asked)
        else:
            self._resolve(path, asked)

    def _end(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _info(self, rest: str) -> None:
        name, _, revision = rest.partition("/revision/")
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._end(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (repository.commit, *repository.branches):
            self._end(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = []
            for file, content in repository.files.items():
                entry: dict[str, Any] = {"rfilename": file, "size": len(content)}
                entry["blobId"] = git_id(content)
                if repository.is_lfs(file):
                    sha256 = repository.etag(file)
                    entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
                siblings.append(entry)
            body = json.dumps({"id": name, "sha": repository.commit, "siblings": siblings})
            self._end(200, {"Content-Type": "application/json"}, body.encode())

    def _resolve(self, path: str, asked: Asked) -> None:
        name, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._end(404, {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and asked.authorization != "Bearer hf_let_me_in_0123456789":
            self._end(403 if asked.authorization else 401, {"X-Error-Code": "GatedRepo"})
        elif revision not in (repository.commit, *repository.branches):
            self._end(404, {"X-Error-Code": "RevisionNotFound"})
        elif file not in repository.files:
            self._end(404, {"X-Error-Code": "EntryNotFound"})
        elif repository.is_lfs(file):
            size = self.hub.head_sizes.get(file, len(repository.files[file]))
            offer = f"<{self.hub.url}/api/models/{name}/xet-read-token/{repository.commit}>"
            self._end(
                302,
                {
                    "X-Repo-Commit": repository.commit,
                    "X-Linked-Etag": f'"{self.hub.etags.get(file, repository.etag(file))}"',
                    "X-Linked-Size": str(size),
                    "X-Xet-Hash": "0" * 64,
                    **({"Link": f'{offer}; rel="xet-auth"'} if self.hub.xet else {}),
                    "Location": f"http://localhost:{self.hub.port}/cdn/{name}/resolve/{file}?sig=x",
                },
            )
        else:
            self._send(repository, file, asked)

    def _send(self, repository: Repository, file: str, asked: Asked) -> None:
        hub, content = self.hub, repository.files[file]
        if self.command == "GET" and hub.refused:
            self._end(hub.refused.pop(0))
            return
        if self.command == "GET" and hub.lies.get(file):
            content = hub.lies[file].pop(0)
        start = 0
        if asked.range and not hub.no_ranges:
            start = int(asked.range.removeprefix("bytes=").partition("-")[0])
        if start >= len(content) and start:
            self._end(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{repository.etag(file)}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        end, cut = len(content), hub.cuts.get(file)
        if cut:
            end = min(end, start + cut.pop(0))
        for at in range(start, end, hub.piece):
            part = content[at : min(end, at + hub.piece)]
            try:
                self.wfile.write(part)
            except OSError:
                break
            asked.sent += len(part)
            if hub.seconds_per_piece:
                time.sleep(hub.seconds_per_piece)
        if end < len(content):
            self.close_connection = True


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on a free port of 127.0.0.1 while the block runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    hub.url = f"http://127.0.0.1:{hub.port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def talk_to(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process and those it starts talk to ``hub`` alone, with its cache in ``folder`` and
    no token."""
    from huggingface_hub import constants

    from runner.hub import remote

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    for name, value in (
        ("HF_ENDPOINT", hub.url),
        ("HF_HOME", str(folder)),
        ("HF_HUB_CACHE", str(folder / "hub")),
        ("HF_TOKEN_PATH", str(folder / "token")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
