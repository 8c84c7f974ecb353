"""The folders of runs: what they are called, and how a run is found again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.errors import UserError
from runner.core.paths import absolute, shortest
from runner.core.text import did_you_mean

_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_TIME_AND_NAME = re.compile(r"\d\d-\d\d-\d\d-(.+)")


def slug(name: str) -> str:
    """Return a run's name as its folder has it."""
    return re.sub(r"[^\w.,=+-]+", "-", name).strip("-.")[:100] or "run"


def run_label(run: Path) -> str:
    """Return a name for a run's files that no other run's have: its date, time and name."""
    folder = run.resolve()
    date = folder.parent.name
    return f"{date}-{folder.name}" if _DATE.fullmatch(date) else folder.name


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder and its run.json describe it."""

    folder: Path
    mlflow_run_id: str
    status: str

    @property
    def name(self) -> str:
        """Its name, as the folder has it."""
        match = _TIME_AND_NAME.fullmatch(self.folder.name)
        name = match[1] if match else self.folder.name
        # The folder of a second run of one name in one second ends in a number.
        first, _, number = self.folder.name.rpartition("-")
        if number.isdigit() and self.folder.with_name(first).is_dir():
            return name.removesuffix(f"-{number}")
        return name


def find_run(text: str, outputs: Path, cwd: Path) -> tuple[RunRecord, str | None]:
    """Find a run by its folder, its name or its MLflow run id.

    Args:
        text: what the user typed.
        outputs: the output folder of the runs.
        cwd: the folder that a relative path starts at.

    Returns:
        The run, and a notice if there are several of this name; it is the newest then.

    Raises:
        UserError: there is none; the message has the nearest names.
    """
    if not text:
        raise UserError("RUN is empty: give a run's folder, its name or its MLflow run id")
    folder = absolute(text, cwd)
    if (folder / "run.json").is_file() or (folder / "checkpoints").is_dir():
        return _record(folder), None
    # The newest first: folders begin with date and time.
    runs = sorted(_runs(outputs), key=lambda run: run_label(run.folder), reverse=True)
    for run in runs:
        if text in (run.mlflow_run_id, run_label(run.folder), run.folder.name):
            return run, None
    named = [run for run in runs if run.name == slug(text)]
    if len(named) > 1:
        return named[0], (
            f"{len(named)} runs are named {text}: this is the newest, {shortest(named[0].folder)}"
        )
    if named:
        return named[0], None
    where = shortest(outputs / "runs")
    if folder.is_dir():
        raise UserError(f"{text} is not the folder of a run: it has no run.json")
    if not runs:
        raise UserError(
            f"there is no run {text}: {where} has none; give the run's folder, or --outputs"
        )
    raise UserError(f"there is no run {text} in {where}.{did_you_mean(text, _names(runs))}")


def _names(runs: Iterable[RunRecord]) -> Iterator[str]:
    for run in runs:
        yield from (run.name, run.folder.name)


def _runs(outputs: Path) -> Iterator[RunRecord]:
    for record in (outputs / "runs").glob("*/*/run.json"):
        yield _record(record.parent)


def _record(folder: Path) -> RunRecord:
    try:
        content: Any = json.loads((folder / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        content = None
    record: dict[str, Any] = content if isinstance(content, dict) else {}
    return RunRecord(folder, record.get("mlflow_run_id") or "", record.get("status") or "unknown")
