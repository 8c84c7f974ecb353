from __future__ import annotations

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from conftest import TOP

from runner.tracking import sweep
from runner.tracking.metrics import Point
from runner.tracking.mlflow_run import RunWriter, Status
from runner.tracking.multirun import Sweep

if TYPE_CHECKING:
    from conftest_mlflow import Store

pytest_plugins = ["conftest_mlflow"]

ID = "2026-11-23/05 12"

JOB = f"""
import sys
from pathlib import Path
from runner.tracking import sweep
print(sweep.open_parent(sys.argv[1], "tests", outputs=Path(sys.argv[2]), sweep_id={ID!r},
                        name="a sweep", tags={{}}))
"""


def open_parent(store: Store) -> str:
    return sweep.open_parent(
        store.uri, "tests", outputs=store.outputs, sweep_id=ID, name="a sweep", tags={"who": "me"}
    )


def child(store: Store, parent: str, rank: int, loss: float | None, status: Status) -> str:
    writer = RunWriter.start(
        store.uri,
        "tests",
        outputs=store.outputs,
        name=f"rank {rank}",
        params={"network.rank": rank, "task": "i2v"},
        tags=sweep.child_tags(parent, ID),
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
    store: Store, children: list[Status], asked: Status, status: Status
) -> None:
    parent = open_parent(store)
    for rank, ended in enumerate(children):
        run_id = child(store, parent, rank, 0.5, "FINISHED")
        store.client.update_run(run_id, status=ended)
    assert sweep.close_parent(store.outputs, ID, asked) == status
    run = store.client.get_run(parent)
    assert run.info.status == status and run.info.end_time


# The parent holds a table with what was swept and how well it went, best first.
def test_the_parent_holds_a_summary(store: Store) -> None:
    parent = open_parent(store)
    ids = {
        rank: child(store, parent, rank, loss, "FINISHED")
        for rank, loss in [(8, 0.3), (16, 0.1), (32, float("nan")), (64, None)]
    }
    sweep.close_parent(store.outputs, ID, "FINISHED")
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
    assert sweep.close_parent(store.outputs, ID, "FINISHED") is None
    parent = open_parent(store)
    sweep.close_parent(store.outputs, ID, "FAILED")
    assert open_parent(store) == parent
    assert store.client.get_run(parent).info.status == "RUNNING"
    store.client.delete_run(parent)
    assert open_parent(store) != parent


# What a sweep's runs are named by is what has several values: no list or table with commas in it.
def test_swept_keys() -> None:
    told = Sweep(
        "id",
        (
            "network.rank=2,4",
            "optimizer=adamw,adafactor",
            "dataset.target_frames=[1,5]",
            "dataset.target_frames=[1,5],[9]",
            "optimizer.args={a:1,b:2}",
            "name='a,b'",
            "training.seed=range(1,4)",
            "task=i2v",
        ),
    )
    assert told.swept == ("network.rank", "optimizer", "dataset.target_frames", "training.seed")
