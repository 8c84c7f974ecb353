"""What a person is updated when the tracking server can't be used: one line, at once."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from servers import HOST, free_port, mlflow_server
from service_fixtures import PASSWORDS, begin, credentials, server_python

if TYPE_CHECKING:
    from service_fixtures import Service

pytest_plugins = ["service_fixtures"]

SECONDS = 60  # imports take long on a busy machine; MLflow's own retries would take minutes


def refused(cwd: Path, env: dict[str, str], *arguments: str) -> str:
    """The one line of a run that is refused within seconds and leaves nothing behind."""
    began = time.monotonic()
    process = begin(cwd, env, "experiment=rehearsal", "tracking=server", *arguments)
    output = process.communicate()[0]
    took = time.monotonic() - began
    assert process.returncode == 2, output
    lines = output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), output
    assert not any(word in output for word in PASSWORDS.values())
    assert list(cwd.iterdir()) == [], "something was left behind"
    assert took < SECONDS, f"{took:.0f} s for {output}"
    print(f"{took:.1f} s  {output.strip()}")
    return output


@contextlib.contextmanager
def other_server() -> Iterator[str]:
    """A web server that is no MLflow server: it serves files, of which it has none."""
    server = http.server.ThreadingHTTPServer((HOST, 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# A wrong password, a wrong user and none at all are distinguished, without showing the password.
def test_a_wrong_password(service: Service, tmp_path: Path) -> None:
    address = f"tracking.uri={service.url}"
    wrong = {**credentials("ann"), "MLFLOW_TRACKING_PASSWORD": PASSWORDS["bob"]}
    assert "refuses this name and password (401)" in refused(tmp_path, wrong, address)
    unknown = {**wrong, "MLFLOW_TRACKING_USERNAME": "eve"}
    assert "refuses this name and password (401)" in refused(tmp_path, unknown, address)
    inside = service.url.replace("://", f"://ann:{PASSWORDS['bob']}@")
    in_address = {"MLFLOW_TRACKING_URI": inside}
    assert "refuses this name and password (401)" in refused(tmp_path, in_address)
    assert "asks for a name and a password (401)" in refused(tmp_path, {}, address)


# A host that does not exist, a port where nothing listens, a server of another kind and an
# address that is none: each is said as what it is.
def test_a_wrong_address(tmp_path: Path) -> None:
    user = credentials("ann")
    output = refused(tmp_path, user, "tracking.uri=http://no-such-host.invalid:5000")
    assert "there is no host no-such-host.invalid" in output
    port = free_port()
    output = refused(tmp_path, user, f"tracking.uri=http://{HOST}:{port}")
    assert f"nothing listens at {HOST} port {port}; start the server" in output
    with other_server() as url:
        output = refused(tmp_path, user, f"tracking.uri={url}")
        assert "answers, but not as an MLflow server does" in output
        output = refused(tmp_path, user, f"tracking.uri={url.replace('http:', 'https:')}")
        assert "speaks no https" in output
    output = refused(tmp_path, user, "tracking.uri=http://")
    assert "names no host" in output
    assert "needs an address" in refused(tmp_path, user)


# A user who may read an experiment but not write to it is reported so, and no run is left.
def test_a_user_without_permission(service: Service, tmp_path: Path) -> None:
    service.ask("experiments/create", {"name": "of ann"}, user="ann")
    (cwd := tmp_path / "cwd").mkdir()
    store, users = service.database.uri("mlflow"), service.database.uri("users")
    with mlflow_server(tmp_path / "server", server_python(), store, users, "READ") as server:
        process = begin(
            *(cwd, credentials("bob"), "experiment=rehearsal", "tracking=server"),
            *(f"tracking.uri={server.url}", "tracking.experiment=of ann"),
        )
        output = process.communicate()[0]
    assert process.returncode == 2, output
    assert output.count("\n") == 1, output
    assert "does not let this user do that (403)" in output and "of ann" in output
    assert list(cwd.glob("outputs/runs/*/*")) == []
    print(output.strip())


# A dry run asks no server.
def test_a_dry_run_needs_no_server(tmp_path: Path) -> None:
    address = f"tracking.uri=http://{HOST}:{free_port()}"
    process = begin(
        tmp_path, {}, "experiment=rehearsal", "tracking=server", address, "dry_run=true"
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert list(tmp_path.iterdir()) == []
