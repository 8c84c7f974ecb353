"""The records of a sweep: files in its folder, which any process can write and read.

``sweep.json`` has the sweep's command line, ``jobs/<number>.json`` the result of each job, and
``parent.json`` (:mod:`runner.tracking.parent_run`) the parent run in MLflow. A job holds a lease
(:mod:`runner.storage.leases`) on its record while its process lives.
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
from runner.storage.leases import Lease, LeaseFolder

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from hydra.core.override_parser.types import Override

# The exit code of a job whose process died without recording one, as after SIGKILL.
KILLED_CODE = 137


@dataclass(frozen=True)
class Sweep:
    """One ``-m`` command line: its folder, and the content of ``sweep.json`` in it."""

    folder: Path
    id: str
    overrides: tuple[str, ...]
    jobs: int | None  # None if a sweeper decides while it runs
    dry_run: bool
    output_dir: str
    tracking: dict[str, Any]
    made: str  # the topmost folder that did not exist before
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
        """Record a new sweep.

        Args:
            folder: the sweep's own folder, which is created.
            overrides: the overrides of the command line, without passwords.
            counted: whether every combination of the values is a job.
            dry_run: whether nothing is to be run.
            output_dir: the option of that name, as it was typed.
            tracking: the options of tracking, without passwords.
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
        values = {name: value for name, value in vars(sweep).items() if name != "folder"}
        write_text(folder / "sweep.json", json.dumps(values, indent=1) + "\n")
        return sweep

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Read the sweep of a folder.

        Raises:
            UserError: the folder has no readable ``sweep.json``.
        """
        try:
            values = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
            return cls(folder, **{**values, "overrides": tuple(values["overrides"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{folder} has no readable sweep.json: give a permanent folder that every job "
                "can reach, hydra.sweep.dir=/shared/sweep."
            ) from error

    @property
    def swept_keys(self) -> tuple[str, ...]:
        """The keys that have several values."""
        keys = [one.key_or_group for one in _parsed(self.overrides) if one.is_sweep_override()]
        return tuple(dict.fromkeys(keys))

    @property
    def is_here(self) -> bool:
        """Whether the sweep was started in this process."""
        return (self.pid, self.host) == (os.getpid(), socket.gethostname())

    def records(self) -> list[JobRecord]:
        """Read the records of the jobs, in order."""
        records = [JobRecord(one.id, one.data, one.alive) for one in self._jobs.all()]
        return sorted(records, key=lambda job: (len(job.id), job.id))

    @property
    def _jobs(self) -> LeaseFolder:
        return LeaseFolder(self.folder / "jobs")

    def job(self, number: int | str, overrides: Sequence[str]) -> Job:
        """Create the record of a job, which the process that runs it then opens."""
        return Job(self, self._jobs, str(number), overrides)


def describe_job(number: str, overrides: Sequence[str], swept_keys: Sequence[str]) -> str:
    """Name a job of a sweep by its number and by its values of the swept keys."""
    own = [o for o in overrides if o.split("=")[0].lstrip("+~") in swept_keys]
    return f"job {number} ({' '.join(own)})" if own else f"job {number}"


class JobRecord(Lease):
    """The lease of a job, whose id is its number and whose data are what the job recorded."""

    @property
    def exit_code(self) -> int | None:
        """The job's exit code; None until it recorded one."""
        code = self.data.get("exit_code")
        return code if isinstance(code, int) else None

    def describe(self, swept_keys: Sequence[str]) -> str:
        """Name the job by its number and by its values of the swept keys."""
        return describe_job(self.id, self.data.get("overrides", ()), swept_keys)


class Job:
    """The record of a running job, written when it begins, notes something, and ends."""

    def __init__(
        self, sweep: Sweep, records: LeaseFolder, number: str, overrides: Sequence[str]
    ) -> None:
        self.sweep = sweep
        self._records, self._number = records, number
        self._lock: BaseFileLock | None = None
        self._began = time.time()
        self._data: dict[str, Any] = {
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
        """Add ``facts``, such as the run's folder, to the record on disk."""
        self._data |= facts
        self._data["seconds"] = round(time.time() - self._began, 3)
        self._records.write(self._number, self._data)

    def __enter__(self) -> Job:
        self._lock = self._records.open(self._number, self._data)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._lock is not None
        if error is not None:
            self.note(exit_code=getattr(error, "exit_code", 1))
        self._records.close(self._number, self._lock, keep=True)


def _combinations(overrides: Sequence[str]) -> int | None:
    """Count the jobs of Hydra's own sweeper; None for values that only it can list."""
    from hydra.errors import HydraException

    try:
        # If a key is given twice, its last values count.
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
