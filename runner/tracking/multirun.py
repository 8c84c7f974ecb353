"""The records of a sweep, which are files in its folder: any process can write and read them.

``sweep.json`` says what was asked for, ``jobs/<number>.json`` what became of each job, and
``parent.json`` (:mod:`runner.tracking.parent_run`) which MLflow run is the parent. A job holds a
lock while it runs, which the system lets go of when its process dies, however it dies.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runner.core.atomic import write_text
from runner.core.errors import UserError
from runner.storage.leases import LeaseFolder

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from hydra.core.override_parser.types import Override

# The exit code of a job whose process died without a word, as SIGKILL makes it.
KILLED_CODE = 137


@dataclass(frozen=True)
class Sweep:
    """One ``-m`` command line: its folder, and what ``sweep.json`` there says."""

    folder: Path
    id: str
    overrides: tuple[str, ...]
    jobs: int | None  # None when a sweeper decides on the way
    dry_run: bool
    output_dir: str
    tracking: dict[str, Any]
    made: str  # the topmost folder that was not there before
    pid: int
    host: str

    @classmethod
    def begin(
        cls,
        folder: Path,
        overrides: Sequence[str],
        *,
        counted: bool,
        dry_run: bool,
        output_dir: str,
        tracking: dict[str, Any],
    ) -> Sweep:
        """Write down a new sweep.

        Args:
            folder: The sweep's own folder, which is made.
            overrides: Words of the command line, without passwords.
            counted: Whether every combination of the values is a job.
            dry_run: Whether nothing is to be run.
            output_dir: The option of that name, as it was typed.
            tracking: The options of tracking, without passwords.
        """
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        sweep = cls(
            folder=folder,
            id=f"{folder.parent.name}-{folder.name}",
            overrides=tuple(overrides),
            jobs=_combinations(overrides) if counted else None,
            dry_run=dry_run,
            output_dir=output_dir,
            tracking=tracking,
            made=str(missing[-1] if missing else folder),
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        said = {name: value for name, value in vars(sweep).items() if name != "folder"}
        write_text(folder / "sweep.json", json.dumps(said, indent=1) + "\n")
        return sweep

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """The sweep of a folder. Raises UserError when the folder has none."""
        try:
            said = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
            return cls(folder, **{**said, "overrides": tuple(said["overrides"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{folder} has no readable sweep.json: give a folder that lasts and that every "
                "job sees, hydra.sweep.dir=/shared/sweep."
            ) from error

    @property
    def swept_keys(self) -> tuple[str, ...]:
        """Keys that have several values."""
        keys = [one.key_or_group for one in _parsed(self.overrides) if one.is_sweep_override()]
        return tuple(dict.fromkeys(keys))

    @property
    def is_here(self) -> bool:
        """Whether this process is the one that the sweep was started in."""
        return (self.pid, self.host) == (os.getpid(), socket.gethostname())

    def records(self) -> list[JobRecord]:
        """What the jobs wrote down, in their order."""
        found = [JobRecord(one.id, one.data, one.alive) for one in self._jobs.all()]
        return sorted(found, key=lambda job: (len(job.number), job.number))

    @property
    def _jobs(self) -> LeaseFolder:
        return LeaseFolder(self.folder / "jobs")

    def job(self, number: int | str, overrides: Sequence[str]) -> Job:
        """The record of the job of that number, to be opened by the process that runs it."""
        return Job(self, self._jobs, str(number), overrides)


@dataclass(frozen=True)
class JobRecord:
    """What a job wrote down, and whether its process lives."""

    number: str
    said: dict[str, Any]
    alive: bool

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it has not said so."""
        code = self.said.get("exit_code")
        return code if isinstance(code, int) else None

    def words(self, swept_keys: Sequence[str]) -> str:
        """The job's number, and what it has otherwise than the other jobs."""
        own = [
            o for o in self.said.get("overrides", ()) if o.split("=")[0].lstrip("+~") in swept_keys
        ]
        return f"job {self.number} ({' '.join(own)})" if own else f"job {self.number}"


class Job:
    """The record of one job, written when it begins, learns something, and ends."""

    def __init__(
        self, sweep: Sweep, records: LeaseFolder, number: str, overrides: Sequence[str]
    ) -> None:
        self.sweep = sweep
        self._records, self._number = records, number
        self._lock: BaseFileLock | None = None
        self._began = time.time()
        self._said: dict[str, Any] = {
            "overrides": list(overrides),
            "exit_code": None,
            "error": "",
            "run_folder": None,
            "mlflow_run_id": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._began,
            "seconds": 0.0,
        }

    def note(self, **facts: Any) -> None:
        """Write down what is known by now, such as the run's folder."""
        self._said |= facts
        self._said["seconds"] = round(time.time() - self._began, 3)
        self._records.write(self._number, self._said)

    def __enter__(self) -> Job:
        self._lock = self._records.open(self._number, self._said)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._lock is not None
        if error is not None:
            self.note(exit_code=getattr(error, "exit_code", 1))
        self._records.close(self._number, self._lock, keep=True)


def _combinations(overrides: Sequence[str]) -> int | None:
    """How many jobs Hydra's own sweeper makes; None for values that only it can list."""
    from hydra.errors import HydraException

    try:
        # A key that is given twice has the values that are given last.
        values = {
            one.get_key_element(): len(list(one.sweep_iterator())) if one.is_sweep_override() else 1
            for one in _parsed(overrides)
        }
    except HydraException:
        return None
    return math.prod(values.values())


def _parsed(overrides: Sequence[str]) -> list[Override]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides(list(overrides))
