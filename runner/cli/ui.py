"""Start the MLflow UI on the runs of the output folder, for this computer only."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlencode

from runner.core.errors import UserError
from runner.tracking import mlflow_store
from runner.tracking.client import QUIET_ENVIRONMENT, connect, without_secrets
from runner.tracking.parent_run import SWEEP_TAG

HOST = "127.0.0.1"
START_SECONDS = 180.0  # on a busy computer the server's imports take long
STOP_SECONDS = 10.0
_PORTS_TRIED = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until Ctrl-C or SIGTERM.

    Returns:
        The exit code: 2 for wrong options, 1 if the server failed, 130 or 143 after a signal.
    """
    args = _parser().parse_args(argv)
    try:
        return _serve(args.outputs, args.tracking_uri, args.port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runner.ui", description=__doc__)
    parser.add_argument("--port", type=_port, default=5000, help="first port to try (5000)")
    parser.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="folder of the runs (outputs)"
    )
    parser.add_argument(
        "--tracking-uri", help="another store: sqlite:////abs/file.db, postgresql://..., http://..."
    )
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)


def _serve(outputs: Path, tracking_uri: str | None, first_port: int) -> int:
    uri = tracking_uri or mlflow_store.sqlite_uri(outputs)
    if uri.startswith(("http://", "https://")):
        print(f"There is already a server: open {without_secrets(uri)}")
        return 0
    outputs = outputs.resolve()
    _check_store(uri, outputs, tracking_uri)
    port = free_port(first_port)
    if port != first_port:
        print(f"Port {first_port} is taken, using {port}", flush=True)
    print("Starting the MLflow UI, this takes up to half a minute ...", flush=True)
    with _signals() as received, tempfile.TemporaryFile() as log:
        server = _start(uri, outputs, port, log)
        try:
            code = _wait_until_ready(server, port, received)
            if code is None:
                print(f"MLflow UI: http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
                sweep = newest_sweep(uri)
                if sweep is not None:
                    print(f"Newest sweep, compared: {sweep_page(port, *sweep)}", flush=True)
                while not received and server.poll() is None:
                    time.sleep(0.2)
        finally:
            _stop(server)
        if received:
            print("MLflow UI ended", flush=True)
            return 128 + received[0]
        _print_tail(log, code or "the server ended by itself")
        return 1


def _check_store(uri: str, outputs: Path, tracking_uri: str | None) -> None:
    if tracking_uri is None:
        database: Path | None = outputs / mlflow_store.DATABASE_NAME
    else:
        database = mlflow_store.sqlite_path(uri)
    if database is not None and not (database.is_file() and database.stat().st_size):
        raise UserError(
            f"no MLflow store at {database} yet; train once (python -m runner "
            "experiment=rehearsal), or give --outputs or --tracking-uri"
        )
    if database is None and "://" not in uri:
        raise UserError(f"--tracking-uri {uri}: give sqlite:////abs/file.db or http://host:port")


def newest_sweep(uri: str) -> tuple[str, str] | None:
    """Return the experiment id and the sweep id of the newest sweep, if there is one."""
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(
        experiments,
        f"tags.`{SWEEP_TAG}` LIKE '%'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if not runs:
        return None
    return runs[0].info.experiment_id, runs[0].data.tags[SWEEP_TAG]


def sweep_page(port: int, experiment_id: str, sweep_id: str) -> str:
    """Return the address of the page that compares a sweep's runs, best ``eval/loss`` first.

    The search excludes the parent run, because MLflow would hide the children under it.
    """
    query = {
        "searchFilter": f'tags.`{SWEEP_TAG}` = "{sweep_id}" and metrics.`eval/loss` > 0',
        "orderByKey": "metrics.`eval/loss`",
        "orderByAsc": "true",
        "compareRunsMode": "CHART",
    }
    return (
        f"http://{HOST}:{port}/#/experiments/{experiment_id}/runs?"
        f"{urlencode(query, quote_via=quote)}"
    )


def free_port(first: int) -> int:
    """Find a free port on this computer's loopback address, beginning with ``first``.

    Raises:
        UserError: only root may use ``first``, or it and the next ports are all taken.
    """
    for port in range(first, min(first + _PORTS_TRIED, 65536)):
        with socket.socket() as probe:
            # macOS allows binding to a port where another program listens on all addresses.
            probe.settimeout(1)
            if probe.connect_ex((HOST, port)) == 0:
                continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except PermissionError as error:
                raise UserError(
                    f"--port {port}: only root may use it, choose above 1023"
                ) from error
            except OSError:
                continue
            return port
    raise UserError(f"--port {first}: this and the next ports are all taken, choose another")


def _start(uri: str, outputs: Path, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {
        name: value
        for name, value in os.environ.items()
        # These would point the server elsewhere or open it to others.
        if not name.startswith(("MLFLOW_SERVER_", "MLFLOW_TRACKING_", "_MLFLOW_"))
    }
    root = mlflow_store.artifact_root(outputs).as_uri()
    environment |= QUIET_ENVIRONMENT
    environment |= {
        # In the environment, so that a database's password is in no process list.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": root,
        "MLFLOW_ARTIFACTS_DESTINATION": root,
        # The server would start about seven job workers.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    # In a new session: Ctrl-C reaches only this process, which then ends the server's group.
    return subprocess.Popen(
        command,
        cwd=outputs if outputs.is_dir() else None,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_until_ready(
    server: subprocess.Popen[bytes], port: int, received: Sequence[int]
) -> str | None:
    """Wait until the server answers or a signal comes; return a problem, or None."""
    # Without a proxy of the environment, which must not be used for this computer.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while not received:
        if server.poll() is not None:
            return f"the server ended with code {server.returncode}"
        if time.monotonic() > deadline:
            return f"the server did not answer within {START_SECONDS:.0f} seconds"
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            opener.open(f"http://{HOST}:{port}/health", timeout=2) as answer,
        ):
            if answer.status == 200:
                return None
        time.sleep(0.2)
    return None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask this process to end in a list."""
    received: list[int] = []
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in ending}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server's process group: first with SIGTERM, then with SIGKILL."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        deadline = time.monotonic() + seconds
        try:
            os.killpg(server.pid, number)
            while time.monotonic() < deadline:
                server.poll()  # collects the leader, which would keep its group from being empty
                os.killpg(server.pid, 0)
                time.sleep(0.05)
        except (ProcessLookupError, PermissionError):
            break
    server.wait()


def _print_tail(log: IO[bytes], problem: str) -> None:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()[-15:]
    print(without_secrets("\n".join(lines)), file=sys.stderr)
    print(f"error: {problem}; its last lines are above", file=sys.stderr)
