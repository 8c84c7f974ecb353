"""The servers that the tests of this folder share, and the runner run against them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers import MlflowServer, Postgres, mlflow_server, postgres

TOP = Path(__file__).resolve().parents[2]

# Of a test's own making, and long enough to be searched for.
PASSWORDS = {"ann": "ann-Qm7wZr2Tx9Lk4Vb", "bob": "bob-Hs5nYc8Jd3Pf6Wg"}


@dataclass(frozen=True)
class Service:
    """A tracking server as a team would have it, with the users ann and bob."""

    database: Postgres
    server: MlflowServer

    @property
    def url(self) -> str:
        return self.server.url

    def ask(
        self, path: str, body: dict[str, Any], user: str = "admin", version: str = "2.0"
    ) -> dict[str, Any]:
        """Post to the server's API as `user`; returns its answer."""
        import base64

        word = self.server.admin if user == "admin" else PASSWORDS[user]
        token = base64.b64encode(f"{user}:{word}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
        request = urllib.request.Request(
            f"{self.url}/api/{version}/mlflow/{path}", json.dumps(body).encode(), headers
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    @contextlib.contextmanager
    def client(self, user: str) -> Iterator[Any]:
        """MLflow's own client, as `user`."""
        from runner.tracking.client import quiet

        quiet()
        from mlflow import MlflowClient

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_USERNAME", user)
            patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS[user])
            # For downloads, which have the address from here only.
            patch.setenv("MLFLOW_TRACKING_URI", self.url)
            patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            yield MlflowClient(self.url)


def credentials(user: str) -> dict[str, str]:
    """What a person puts into the environment."""
    return {
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": PASSWORDS[user],
    }


def server_python() -> Path:
    """The interpreter with MLflow's server parts, made by scripts/check-services."""
    python = Path(os.environ.get("RUNNER_SERVER_PYTHON", TOP / ".venv-server/bin/python"))
    if not python.is_file():
        pytest.fail(f"there is no {python}: run scripts/check-services")
    return python


def begin(cwd: Path, env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start the runner as a person would, in `cwd`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *arguments],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(TOP), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("mlflow server [é]")
    python = server_python()
    # Ended by a time limit, the servers must end too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        postgres(["mlflow", "users"]) as database,
        mlflow_server(folder, python, database.uri("mlflow"), database.uri("users")) as server,
    ):
        found = Service(database, server)
        for user, word in PASSWORDS.items():
            found.ask("users/create", {"username": user, "password": word})
        yield found
