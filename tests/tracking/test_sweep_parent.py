from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import TOP

from runner.core.errors import UserError
from runner.tracking import parent_run
from runner.tracking.metrics import Point
from runner.tracking.mlflow_run import RunStatus, RunWriter
from runner.tracking.multirun import Sweep
from runner.tracking.passwords import hidden, revealed

if TYPE_CHECKING:
    from conftest_mlflow import Store

pytest_plugins = ["conftest_mlflow"]

ID = "2026-11-23-05-12-aaaa"

JOB = f"""
import sys
from pathlib import Path
from runner.tracking import parent_run
outputs = Path(sys.argv[2])
print(parent_run.open_parent(sys.argv[1], "tests", outputs=outputs, folder=outputs / "sweep",
                        sweep_id={ID!r}, name="a sweep", tags={{}}))
"""


def open_parent(store: Store) -> str:
    return parent_run.open_parent(
        store.uri,
        "tests",
        outputs=store.outputs,
        folder=store.outputs / "sweep",
        sweep_id=ID,
        name="a sweep",
        tags={"who": "me"},
    )


def close_parent(
    store: Store, status: RunStatus, killed: Collection[str] = ()
) -> tuple[RunStatus, str] | None:
    return parent_run.close_parent(store.outputs / "sweep", status, killed=killed)


def child(store: Store, parent: str, rank: int, loss: float | None, status: RunStatus) -> str:
    writer = RunWriter.start(
        store.uri,
        "tests",
        outputs=store.outputs,
        name=f"rank {rank}",
        params={"network.rank": rank, "task": "i2v"},
        tags=parent_run.child_tags(parent, ID),
        parent_id=parent,
    )
    writer.log_points([Point("loss/average", 0.5, 1, 1000)])
    if loss is not None:
        writer.log_points([Point("eval/loss", loss, 1, 1000)])
    writer.finish(status)
    return writer.run_id


# Children that start at once, in threads and in other processes, get one and the same parent.
def test_all_children_get_one_parent(store: Store) -> None:
    command = [sys.executable, "-c", JOB, store.uri, str(store.outputs)]
    jobs = [subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: open_parent(store), range(4)))
    found |= {job.communicate(timeout=60)[0].strip() for job in jobs}
    assert len(found) == 1
    experiment = store.client.get_experiment_by_name("tests")
    [run] = store.client.search_runs([experiment.experiment_id])
    assert run.info.run_id == found.pop() and run.info.run_name == "a sweep"
    assert run.data.tags["runner.sweep"] == ID


# The parent ends as finished only if every child did; what else happened shows in its status.
@pytest.mark.parametrize(
    ("children", "asked", "status"),
    [
        (["FINISHED", "FINISHED"], "FINISHED", "FINISHED"),
        (["FINISHED", "FAILED"], "FINISHED", "FAILED"),
        (["FINISHED", "KILLED"], "FINISHED", "KILLED"),
        (["FINISHED", "RUNNING"], "FINISHED", "FAILED"),
        ([], "FINISHED", "FAILED"),
        (["FINISHED"], "KILLED", "KILLED"),
    ],
)
def test_the_parent_ends_with_the_true_status(
    store: Store, children: list[RunStatus], asked: RunStatus, status: RunStatus
) -> None:
    parent = open_parent(store)
    for rank, ended in enumerate(children):
        run_id = child(store, parent, rank, 0.5, "FINISHED")
        store.client.update_run(run_id, status=ended)
    closed = close_parent(store, asked)
    assert closed is not None and closed[0] == status
    run = store.client.get_run(parent)
    assert run.info.status == status and run.info.end_time


# The parent holds a table with what was swept and how well it went, best first.
def test_the_parent_holds_a_summary(store: Store) -> None:
    parent = open_parent(store)
    ids = {
        rank: child(store, parent, rank, loss, "FINISHED")
        for rank, loss in [(8, 0.3), (16, 0.1), (32, float("nan")), (64, None)]
    }
    close_parent(store, "FINISHED")
    [table] = store.outputs.glob("mlartifacts/*/artifacts/sweep.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    fields = ["name", "status", "network.rank", "eval/loss", "loss/average", "run_id"]
    assert list(rows[0]) == fields
    assert [row["network.rank"] for row in rows] == ["16", "8", "32", "64"]
    assert [row["eval/loss"] for row in rows[:2]] == ["0.1", "0.3"]
    assert [row["run_id"] for row in rows] == [ids[16], ids[8], ids[32], ids[64]]
    loaded = json.loads(table.with_suffix(".json").read_text())
    assert [row["name"] for row in loaded] == ["rank 16", "rank 8", "rank 32", "rank 64"]
    run = store.client.get_run(ids[8])
    assert run.data.tags["mlflow.parentRunId"] == parent and run.data.tags["runner.sweep"] == ID


# A sweep that goes on after its end has the same parent, running again; one whose store was
# removed gets a new parent; closing what was never opened does nothing.
def test_a_sweep_can_go_on(store: Store) -> None:
    assert close_parent(store, "FINISHED") is None
    parent = open_parent(store)
    close_parent(store, "FAILED")
    assert open_parent(store) == parent
    assert store.client.get_run(parent).info.status == "RUNNING"
    store.client.delete_run(parent)
    assert open_parent(store) != parent


# A child whose process died is ended as killed by the sweep, since nobody else can, and the parent
# with it.
def test_a_child_that_died_is_ended(store: Store) -> None:
    parent = open_parent(store)
    died = child(store, parent, 8, None, "FINISHED")
    store.client.update_run(died, status="RUNNING")
    closed = close_parent(store, "FINISHED", killed=[died])
    assert closed is not None and closed[0] == "KILLED"
    assert store.client.get_run(died).info.status == "KILLED"


# A parent at an address with a password is ended by a process that only has the sweep's files and
# the variables it passed on; the files do not have the password.
def test_the_address_is_read_back(tmp_path: Path) -> None:
    uri = "http://ann:p@ss/w:rd 'x'@localhost:1"
    variables = {"RUNNER_PASSWORD_1": "another"}
    text = hidden(uri, variables)
    (tmp_path / "parent.json").write_text(json.dumps({"run_id": "r", "uri": text, "outputs": "o"}))
    assert "p@ss" not in text and revealed(text, variables) == uri
    assert hidden(uri, variables) == text and set(variables.values()) == {
        "another",
        "p@ss/w:rd 'x'",
    }
    with pytest.raises(UserError, match="password"):
        parent_run.close_parent(tmp_path, "FINISHED")


# What a sweep's runs are named by is what has several values: no list or table with commas in it;
# and its jobs are counted as Hydra makes them, unless only Hydra can.
def test_swept_keys(tmp_path: Path) -> None:
    overrides = [
        "network.rank=2,4",
        "network.rank=2,4,8",
        "optimizer=adamw,adafactor",
        "dataset.target_frames=[1,5]",
        "dataset.target_frames=[1,5],[9]",
        "optimizer.args={a:1,b:2}",
        "name='a,b'",
        "training.seed=range(1,4)",
        "task=i2v",
    ]
    begun = begin(tmp_path, overrides)
    swept_keys = ("network.rank", "optimizer", "dataset.target_frames", "training.seed")
    assert begun.swept_keys == swept_keys
    assert begun.jobs == 3 * 2 * 2 * 3
    assert Sweep.read(tmp_path) == begun
    assert begin(tmp_path, ["task=glob(*)"]).jobs is None


def begin(folder: Path, overrides: list[str]) -> Sweep:
    return Sweep.begin(
        folder, overrides, counted=True, dry_run=False, output_dir="outputs", tracking={}
    )


# A job's record tells one that ended from one whose process is gone, whatever process asks.
def test_a_job_that_dies_is_seen(tmp_path: Path) -> None:
    begun = begin(tmp_path, ["network.rank=2,4"])
    with begun.job(0, ["network.rank=2"]) as job:
        [record] = begun.records()
        assert record.alive and record.exit_code is None
        job.note(exit_code=0)
    code = f"""
import os, signal
from pathlib import Path
from runner.tracking.multirun import Sweep
with Sweep.read(Path({str(tmp_path)!r})).job(1, ["network.rank=4"]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=TOP).returncode == -signal.SIGKILL
    first, second = begun.records()
    assert (first.exit_code, second.exit_code, second.alive) == (0, None, False)
    assert second.describe(begun.swept_keys) == "job 1 (network.rank=4)"
