"""The parent run of a sweep in MLflow, shared by children in any number of processes."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.atomic import write_text
from runner.core.errors import UserError
from runner.tracking.client import connect, first_line
from runner.tracking.mlflow_run import PARENT_TAG, RunStatus, RunWriter
from runner.tracking.passwords import hidden, revealed

if TYPE_CHECKING:
    from mlflow.entities import Run

SWEEP_TAG = "runner.sweep"
SUMMARY_METRICS = ("eval/loss", "loss/average")


def child_tags(parent_id: str, sweep_id: str) -> dict[str, str]:
    """Return a child's tags: MLflow's to nest it, the runner's to find it in a flat list."""
    return {PARENT_TAG: parent_id, SWEEP_TAG: sweep_id}


def open_parent(
    uri: str,
    experiment: str,
    *,
    outputs: Path,
    folder: Path,
    sweep_id: str,
    name: str,
    tags: Mapping[str, str],
) -> str:
    """Return the id of a sweep's parent run, which the first child to ask creates.

    All children, in this process or others, get the same run: a file lock guards ``parent.json`` in
    the sweep's folder.

    Args:
        uri: the address of a store that was initialised.
        experiment: the experiment of all runs of the sweep.
        outputs: the folder that ``mlartifacts`` is in, if the store is not a server.
        folder: the sweep's folder.
        sweep_id: the sweep's id, a tag of the run.
        name: the run's name.
        tags: further tags.

    Raises:
        UserError: the store refused, or the folder can't be written to.
    """
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder / "parent.lock")):
            run_id = _recorded(folder).get("run_id")
            if isinstance(run_id, str) and _is_open(uri, run_id):
                return run_id
            writer = RunWriter.start(
                uri,
                experiment,
                outputs=outputs,
                name=name,
                params={},
                tags={**tags, SWEEP_TAG: sweep_id},
            )
            record = {
                "run_id": writer.run_id,
                "uri": hidden(uri, os.environ),
                "outputs": str(outputs),
            }
            write_text(folder / "parent.json", json.dumps(record, indent=2) + "\n")
            return writer.run_id
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def close_parent(
    folder: Path, status: RunStatus, *, killed: Collection[str] = ()
) -> tuple[RunStatus, str] | None:
    """End the parent run with a table of its children (``sweep.csv``, ``sweep.json``).

    It ends as ``status``, except that FINISHED needs children that all finished: one that was
    killed makes it KILLED, one that failed or never ended FAILED.

    Args:
        folder: the sweep's folder.
        status: how its jobs ended.
        killed: ids of children whose processes died, and which are ended here as KILLED.

    Returns:
        The status it ended with and the hint where to find it; None if no parent was opened.

    Raises:
        UserError: the store can't be read.
    """
    record = _recorded(folder)
    run_id, uri, outputs = (record.get(key) for key in ("run_id", "uri", "outputs"))
    if not isinstance(run_id, str) or not isinstance(uri, str):
        return None
    address = revealed(uri, os.environ)
    if address is None:
        raise UserError(f"the password of {uri} is not known to this process")
    client = connect(address)
    try:
        for child in killed:
            client.set_terminated(child, "KILLED")
        parent = client.get_run(run_id)
        children = _children(client, parent)
    except Exception as error:
        raise UserError(first_line(error)) from error
    writer = RunWriter(client, address, run_id, parent.info.experiment_id, Path(str(outputs)))
    rows = summary(children)
    writer.log_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "sweep.json")
    writer.log_text(_csv(rows), "sweep.csv")
    true_status = _status_with_children(status, [child.info.status for child in children])
    writer.finish(true_status)
    return true_status, writer.url_hint


def summary(children: Sequence[Run]) -> list[dict[str, Any]]:
    """Build one row per child, best first: name, status, swept parameters, losses.

    A swept parameter is one whose value is not the same in all children. Rows are sorted by
    evaluation loss if there is one, else by average training loss.
    """
    keys = sorted({key for child in children for key in child.data.params})
    swept_keys = [
        key for key in keys if len({child.data.params.get(key) for child in children}) > 1
    ]
    rows = [
        {
            "name": child.info.run_name,
            "status": child.info.status,
            **{key: child.data.params.get(key) for key in swept_keys},
            **{key: child.data.metrics.get(key) for key in SUMMARY_METRICS},
            "run_id": child.info.run_id,
        }
        for child in children
    ]
    return sorted(rows, key=_rank)


def _rank(row: Mapping[str, Any]) -> tuple:
    # A missing loss and NaN (the only value unequal to itself) come last.
    losses = [row[key] for key in SUMMARY_METRICS]
    known = [loss is not None and loss == loss for loss in losses]
    order = [(0, loss) if ok else (1, 0.0) for loss, ok in zip(losses, known, strict=True)]
    return (*order, str(row["name"]))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    fields = list(rows[0]) if rows else ["name", "status", *SUMMARY_METRICS, "run_id"]
    table = csv.DictWriter(out, fields, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


def _status_with_children(status: RunStatus, children: Sequence[str]) -> RunStatus:
    if status != "FINISHED":
        return status
    if children and all(child == "FINISHED" for child in children):
        return "FINISHED"
    return "KILLED" if "KILLED" in children else "FAILED"


def _children(client: Any, parent: Run) -> list[Run]:
    children: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [parent.info.experiment_id],
            f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'",
            max_results=1000,
            page_token=token,
        )
        children.extend(page)
        token = page.token
        if not token:
            return children


def _is_open(uri: str, run_id: str) -> bool:
    """Reopen the run if it has ended; return False if it was deleted."""
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            return False
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise UserError(f"cannot read the sweep: {first_line(error)}") from error
    return True


def _recorded(folder: Path) -> dict[str, object]:
    try:
        record = json.loads((folder / "parent.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
