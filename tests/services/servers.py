"""A PostgreSQL and an MLflow server of the tests' own, on loopback ports nobody uses."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_SECONDS = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def postgres_program(name: str) -> str:
    """A program of PostgreSQL, which Debian keeps out of the PATH."""
    found = shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None
    )
    if found is None:
        raise FileNotFoundError(f"{name} is missing: apt-get install postgresql")
    return found


@dataclass(frozen=True)
class Postgres:
    """A cluster that answers on loopback only, and asks for a password."""

    port: int
    password: str
    version: str
    folder: Path

    def uri(self, database: str) -> str:
        return f"postgresql+psycopg2://mlflow:{self.password}@{HOST}:{self.port}/{database}"


@contextlib.contextmanager
def postgres(databases: Sequence[str]) -> Iterator[Postgres]:
    """A new cluster with empty databases; it and its folder are gone afterwards."""
    # Not below pytest's folders, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="runner-postgres-"))
    data, word, log = folder / "data", folder / "password", folder / "log"
    password, port = secrets.token_urlsafe(16), free_port()
    word.touch(0o600)
    word.write_text(password + "\n")
    user = None
    if os.geteuid() == 0:  # initdb and postgres refuse root
        user = next(name for name in ("postgres", "nobody") if _is_user(name))
        shutil.chown(folder, user)
        shutil.chown(word, user)
    create = [postgres_program("initdb"), "-D", str(data), "-U", "mlflow", "--pwfile", str(word)]
    _run([*create, "-A", "scram-sha-256", "-E", "UTF8", "--locale", "C.UTF-8"], user)
    word.unlink()
    options = ["-D", str(data), "-p", str(port), "-h", HOST, "-k", str(folder)]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [postgres_program("postgres"), *options], user=user, stdout=out, stderr=out, cwd="/"
        )
    try:
        environment = {**os.environ, "PGPASSWORD": password, "PGUSER": "mlflow", "PGHOST": HOST}
        environment |= {"PGPORT": str(port), "PGDATABASE": "postgres"}
        psql = [postgres_program("psql"), "-qAt", "-v", "ON_ERROR_STOP=1", "-c"]
        _until(lambda: _works([*psql, "select 1"], environment), server, "PostgreSQL")
        for database in databases:
            subprocess.run([*psql, f"create database {database}"], env=environment, check=True)
        version = subprocess.run(
            [*psql, "show server_version"], env=environment, check=True, capture_output=True
        ).stdout.decode()
        yield Postgres(port, password, version.strip(), folder)
    finally:
        server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class MlflowServer:
    """`mlflow server` with authentication, PostgreSQL behind it, and artifacts through it."""

    url: str
    admin: str
    artifacts: Path
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def mlflow_server(
    folder: Path, python: Path, store: str, users: str, permission: str = "EDIT"
) -> Iterator[MlflowServer]:
    """A server for the databases `store` and `users`, run by the environment of `python`."""
    folder.mkdir(parents=True, exist_ok=True)
    port, admin = free_port(), secrets.token_urlsafe(16)
    config = folder / "auth.ini"
    config.touch(0o600)
    config.write_text(
        "[mlflow]\n"
        f"default_permission = {permission}\n"
        # configparser would read a percent sign as the start of a reference
        f"database_uri = {users.replace('%', '%%')}\n"
        # Else every request costs a password hash, a tenth of a second.
        "auth_cache_ttl_seconds = 60\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "_MLFLOW"))}
    environment |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": admin,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        # In the environment, since a process list shows every command line.
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    artifacts, log = folder / "artifacts", folder / "server.log"
    command = [str(python), "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--host", HOST, "--port", str(port), "--workers", "2"]
    command += ["--serve-artifacts", "--artifacts-destination", str(artifacts)]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    server = MlflowServer(f"http://{HOST}:{port}", admin, artifacts, process, log)
    try:
        _until(lambda: _answers(f"{server.url}/health"), process, f"mlflow server ({log})")
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _run(command: list[str], user: str | None) -> None:
    done = subprocess.run(command, user=user, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr


def _works(command: list[str], environment: dict[str, str]) -> bool:
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError, urllib.error.URLError), opener.open(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        assert process.poll() is None, f"{what} ended with code {process.returncode}"
        assert time.monotonic() < deadline, f"{what} did not start in {START_SECONDS} s"
        time.sleep(0.3)
