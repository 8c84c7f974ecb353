from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from conftest import TOP

from runner.cli import ui
from runner.tracking.mlflow_run import RunWriter

if TYPE_CHECKING:
    from conftest_mlflow import Store

pytest_plugins = ["conftest_mlflow"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        content: bytes = answer.read()
        return content


# The UI opens on the next free port of the loopback alone, shows the runs and artifacts of the
# store, and leaves no process behind when it is asked to end.
def test_the_ui_shows_the_runs_and_ends_cleanly(store: Store, taken_port: int) -> None:
    run = RunWriter.start(
        store.uri, "tests", outputs=store.outputs, name="a run", params={"rank": 8}, tags={}
    )
    run.log_text("hello", "notes.txt")
    run.finish("FINISHED")
    with subprocess.Popen(
        [sys.executable, "-m", "runner.ui", f"--port={taken_port}", f"--outputs={store.outputs}"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith(f"Port {taken_port} is taken, using ")
        assert lines[2].startswith("MLflow UI: http://127.0.0.1:"), lines
        url = lines[2].split()[2]
        family = psutil.Process(process.pid).children(recursive=True)
        experiment = store.client.get_experiment_by_name("tests").experiment_id
        found = json.loads(
            ask(f"{url}/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment]})
        )
        [shown] = found["runs"]
        assert shown["info"]["run_id"] == run.run_id
        assert ask(f"{url}/get-artifact?path=notes.txt&run_uuid={run.run_id}") == b"hello"
        assert b"<html" in ask(url)
        port = int(url.rsplit(":", 1)[1])
        addresses = {
            connection.laddr.ip
            for member in family
            for connection in member.net_connections("tcp")
            if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
        }
        assert addresses == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert process.stdout.read() == "MLflow UI ended\n"
    assert family and not psutil.wait_procs(family, timeout=5)[1]


# Ctrl-C while the server is still starting ends it too.
def test_ctrl_c_during_the_start_ends_the_server(store: Store) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "runner.ui", "--outputs", str(store.outputs)],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while not psutil.Process(process.pid).children():
            pass
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not psutil.wait_procs(family, timeout=5)[1]


# What is wrong with the options is one line and exit code 2, and nothing is created.
def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in [
        (["--outputs", str(tmp_path / "none")], "no MLflow store at"),
        (["--tracking-uri", f"sqlite:///{tmp_path}/none.db"], "no MLflow store at"),
        (["--tracking-uri", "sqlite:///none.db"], "absolute"),
        (["--tracking-uri", "mlruns"], "--tracking-uri mlruns"),
    ]:
        assert ui.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# A server that cannot start is said with its own last words, and exit code 1.
def test_a_server_that_fails_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_text("x")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert ui.main(["--outputs", str(tmp_path), "--port", "20000"]) == 1
    assert "the server ended with code 1" in capsys.readouterr().err


# A running server elsewhere needs none here; its address is shown without the password.
def test_a_server_elsewhere_is_pointed_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert ui.main(["--tracking-uri", "http://ann:geheim@host:5000"]) == 0
    assert "http://ann:***@host:5000" in capsys.readouterr().out


# Help comes at once: nothing heavy is imported for it.
def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, runner.ui\n"
        "try: runner.ui.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlflow', 'torch', 'numpy', 'sqlalchemy', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
