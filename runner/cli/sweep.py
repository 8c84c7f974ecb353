"""The start and the end of a sweep; its jobs, in whatever processes, run in between."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from runner.cli.literal import quote
from runner.core.console import Console
from runner.core.errors import UserError, describe_os_error
from runner.core.paths import absolute, shortest
from runner.core.process import GRACE_SECONDS, Stopped, signals_deferred
from runner.core.text import counted
from runner.tracking.multirun import KILLED_CODE, JobRecord, Sweep
from runner.tracking.passwords import hide_in_config, remember

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from runner.tracking.mlflow_run import RunStatus

# The sweep's folder, for the process that started it, when Hydra is done.
FOLDER_VARIABLE = "RUNNER_SWEEP_FOLDER"
# Ctrl-C reaches the jobs as well, which get this time to end by themselves and record why.
_PATIENCE_SECONDS = 3.0
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class Beginning(Callback):
    """A callback that Hydra calls before it hands a composed sweep to a sweeper and a launcher."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Create the sweep's folder, pass it to every job, and remove passwords from the config.

        Hydra composes each job from the overrides, so the folder is added to them; the config here
        is only saved and passed on.
        """
        try:
            _begin(config)
        except Exception as error:
            # An Exception would only be a warning for Hydra, which would then save the config.
            raise SystemExit(1) from error


def _begin(config: DictConfig) -> None:
    from omegaconf import OmegaConf, open_dict, read_write
    from omegaconf.errors import OmegaConfBaseException

    hide_in_config(config, os.environ)
    # The address may be an interpolation, and this process ends the parent run there.
    remember(os.environ.get("MLFLOW_TRACKING_URI"), os.environ)
    with suppress(OmegaConfBaseException):
        remember(config.tracking.uri, os.environ)
    sweeper = config.hydra.sweeper
    folder = _new_folder(config)
    try:
        Sweep.begin(
            folder,
            OmegaConf.to_container(config.hydra.overrides.task),  # type: ignore[arg-type]
            counted=sweeper.get("_target_") == _BASIC_SWEEPER and not sweeper.get("params"),
            dry_run=bool(config.dry_run),
            output_dir=config.output_dir,
            tracking=OmegaConf.to_container(config.tracking),  # type: ignore[arg-type]
        )
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({describe_os_error(error)}): name another output_dir."
        ) from error
    os.environ[FOLDER_VARIABLE] = str(folder)
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quote(str(folder))}")


def _new_folder(config: DictConfig) -> Path:
    if config.dry_run:
        return Path(tempfile.mkdtemp(prefix="runner-sweep-"))
    now = time.localtime()
    name = f"{time.strftime('%H-%M-%S', now)}-{secrets.token_hex(2)}"
    return absolute(config.hydra.sweep.dir, Path.cwd()) / time.strftime("%Y-%m-%d", now) / name


def has_begun() -> bool:
    """Whether this process has a sweep that has not ended."""
    return FOLDER_VARIABLE in os.environ


def end_sweep(code: int, console: Console) -> int:
    """End a sweep, if there is one: end its jobs and its parent run, and print a summary.

    Args:
        code: the exit code so far, which misses failures of jobs in other processes.
        console: the console for the summary.

    Returns:
        The sweep's exit code: 128 + n if signal n ended it or a job, else the highest of its jobs.
    """
    folder = os.environ.pop(FOLDER_VARIABLE, None)
    if folder is None:
        return code
    try:
        with signals_deferred():
            sweep = Sweep.read(Path(folder))
            code = _End(sweep, _ended_jobs(sweep), code, console).report()
            if sweep.dry_run:
                shutil.rmtree(sweep.folder, ignore_errors=True)
    except Stopped as stopped:
        return stopped.exit_code
    except UserError as error:
        console.error(str(error))
        return code or 1
    return code


def _ended_jobs(sweep: Sweep) -> list[JobRecord]:
    """Wait until no job runs on this host, asking those that do to end; return all jobs."""
    began = time.monotonic()
    asked = False
    while True:
        jobs = sweep.records()
        running = [
            job for job in jobs if job.alive and job.data.get("host") == socket.gethostname()
        ]
        waited = time.monotonic() - began
        if not running or waited > _PATIENCE_SECONDS + GRACE_SECONDS + 5:
            return jobs
        if waited > _PATIENCE_SECONDS and not asked:
            asked = True
            for job in running:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(job.data["pid"]), signal.SIGTERM)
        time.sleep(0.1)


class _End:
    """The work at the end of a sweep."""

    def __init__(self, sweep: Sweep, jobs: list[JobRecord], code: int, console: Console) -> None:
        self.sweep, self.jobs, self.console = sweep, jobs, console
        self.killed = [job for job in jobs if job.exit_code is None and not job.alive]
        self.running = [job for job in jobs if job.exit_code is None and job.alive]
        self.never_started = 0 if sweep.jobs is None else max(0, sweep.jobs - len(jobs))
        codes = [KILLED_CODE if job.exit_code is None else job.exit_code for job in jobs]
        codes = [code, *codes, 1 if self.never_started else 0]
        self.code = next((one for one in codes if one >= 128), max(codes))

    def report(self) -> int:
        """Print what became of the jobs, end the parent run, and return the exit code."""
        if not self.jobs and self.code == 2:
            self._remove()  # Hydra refused a job's values, so nothing was started
            return self.code
        for job in self.killed:
            self.console.error(
                f"{self._named(job)} was killed before it could record how it ended."
            )
        for job in self.running:
            where = f"process {job.data.get('pid')} on {job.data.get('host')}"
            self.console.error(f"{self._named(job)} is still running ({where}).")
        if self.never_started:
            self.console.error(f"{counted(self.never_started, 'job')} of the sweep never started.")
        if not self.sweep.dry_run:
            self._summary()
        return self.code

    def _named(self, job: JobRecord) -> str:
        folder = job.data.get("run_folder")
        where = f" in {shortest(Path(str(folder)))}" if folder else ""
        return f"{job.describe(self.sweep.swept_keys)}{where}"

    def _summary(self) -> None:
        good = sum(job.exit_code == 0 for job in self.jobs)
        total = self.sweep.jobs or len(self.jobs)
        self.console.heading(
            f"sweep ended: {good} of {counted(total, 'job')} finished, "
            f"in {shortest(self.sweep.folder)}"
        )
        for job in self.jobs:
            if job.exit_code:
                why = f": {job.data['error']}" if job.data.get("error") else ""
                result = f"{self._named(job)} ended with exit code {job.exit_code}{why}"
                self.console.line(f"  {result}")
        if page := self._close_parent():
            from runner.pipeline.record import how_to_compare

            tracking, output_dir = self.sweep.tracking, self.sweep.output_dir
            how = how_to_compare(tracking["name"], tracking["uri"], output_dir, page)
            self.console.line(f"  Compare the runs: {how}")

    def _close_parent(self) -> str | None:
        """End the parent run with the sweep's true status; return the hint where to find it."""
        from runner.tracking.parent_run import close_parent

        status: RunStatus = "KILLED" if self.code >= 128 else "FAILED" if self.code else "FINISHED"
        killed = [
            str(job.data["mlflow_run_id"]) for job in self.killed if job.data["mlflow_run_id"]
        ]
        try:
            closed = close_parent(self.sweep.folder, status, killed=killed)
        except UserError as error:
            self.console.notice(f"MLflow: the sweep's parent run could not be ended: {error}")
            return None
        return closed[1] if closed else None

    def _remove(self) -> None:
        folder = self.sweep.folder
        for name in ("sweep.json", "multirun.yaml"):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: there are other sweeps
            for place in (folder, *folder.parents):
                place.rmdir()
                if str(place) == self.sweep.made:
                    break
