from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import TOP

from runner.tracking import mlflow_store
from runner.tracking.client import connect

PROCESSES = 6

# Starts when asked to, so that all meet the fresh store at once. Any attempt to reach the network
# ends it with a code of its own.
JOB = """
import os, socket, sys
from pathlib import Path

def refuse(*_):
    os._exit(77)

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

from runner.tracking import mlflow_store
from runner.tracking.metrics import Point
from runner.tracking.mlflow_run import RunWriter

outputs, number = Path(sys.argv[1]), sys.argv[2]
uri = mlflow_store.sqlite_uri(outputs)
sys.stdin.readline()
mlflow_store.initialise(uri, outputs)
writer = RunWriter.start(
    uri, "race", outputs=outputs, name=f"run {number}", params={"number": number}, tags={}
)
for step in range(50):
    writer.log_points([Point("loss/current", 0.5, step, 1000 + step)])
writer.log_text(number, "number.txt")
writer.finish("FINISHED")
sys.exit(f"problems: {writer.problems}" if writer.problems else 0)
"""


# Any number of processes may meet a store that is not there yet: each gets its run, in one
# experiment, with every point, without a word on its standard error and without the network.
def test_processes_share_a_fresh_store(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    # Telemetry is off by itself under pytest and in CI, which must not be what keeps it off.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "MLFLOW")) and name not in ("CI", "DO_NOT_TRACK")
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(outputs), str(number)],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(TOP)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    try:
        for job in jobs:
            assert job.stdin is not None
            job.stdin.write("go\n")
            job.stdin.flush()
        results = [(job.communicate(timeout=120)[0], job.returncode) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert results == [("", 0)] * PROCESSES
    client = connect(mlflow_store.sqlite_uri(outputs))
    experiment = client.get_experiment_by_name("race")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"run {n}" for n in range(PROCESSES)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        assert len(client.get_metric_history(run.info.run_id, "loss/current")) == 50
    assert len(list(outputs.glob("mlartifacts/*/artifacts/number.txt"))) == PROCESSES
