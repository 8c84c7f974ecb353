"""What a tracking server's answers are reported as, with a small server that gives them."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from runner.core.errors import UserError
from runner.tracking.server import check_server

ASK = "experiments/search"


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that gives one answer to everything, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


# Each answer that rules a server out is reported as what it is, in one line without the password,
# and is not asked for again and again.
@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b"You are not authenticated.", "refuses this name and password"),
        (403, b"Permission denied", "does not let this user"),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        (404, b"<html>Not Found</html>", "not as an MLflow server does"),
        (404, b'{"detail": "Not Found"}', "not as an MLflow server does"),
        (200, b"<html>hello</html>", "not as an MLflow server does"),
        (503, b"starting", "not ready or fails"),
    ],
)
def test_answers_are_told(
    status: int, body: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with answering(status, body) as (url, asked):
        with pytest.raises(UserError) as caught:
            check_server(url.replace("://", "://ann:geheim12@"))
        message = str(caught.value)
    assert words in message and "\n" not in message and "geheim12" not in message
    assert 1 <= len(asked) <= 2 and ASK in asked[0]


# Without a name and a password it is said which variables take them.
def test_credentials_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    with answering(401, b"no") as (url, _), pytest.raises(UserError, match="set MLFLOW_TRACKING_"):
        check_server(url)


# A server that answers as MLflow does is taken, and MLflow's own patience is left as it was.
def test_a_right_answer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    with answering(200, b'{"experiments": []}') as (url, asked):
        check_server(url)
    assert len(asked) == 1 and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
