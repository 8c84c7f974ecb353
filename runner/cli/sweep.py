"""A sweep's beginning and end; what lies between is its jobs', in whatever processes they run."""

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

from runner.cli.overrides import quote
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

# How the process that starts a sweep finds its folder again when Hydra is done.
FOLDER_VARIABLE = "RUNNER_SWEEP_FOLDER"
# Ctrl-C reaches the jobs as well, which then end by themselves and say what ended them.
_PATIENCE_SECONDS = 3.0
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class Beginning(Callback):
    """What Hydra calls when a sweep is composed and before any sweeper or launcher has it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the sweep's folder, name it to every job, and take passwords out of the config.

        Hydra composes each job anew from the overrides, which carry the folder to any process; the
        config here is only written down and passed on.
        """
        try:
            _begin(config)
        except Exception as error:
            # Of an Exception Hydra makes a warning, and goes on to write the config down.
            raise SystemExit(1) from error


def _begin(config: DictConfig) -> None:
    from omegaconf import OmegaConf, open_dict, read_write
    from omegaconf.errors import OmegaConfBaseException

    hide_in_config(config, os.environ)
    # The address may be an interpolation; the parent run is ended there, by this process.
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
    """Whether this process has a sweep that is not ended."""
    return FOLDER_VARIABLE in os.environ


def end_sweep(code: int, console: Console) -> int:
    """End what :class:`Beginning` began: its jobs, its parent run, and say what became of it.

    Args:
        code: How it looks from this process, which knows of a job only what a launcher tells.
        console: Where to say it.

    Returns:
        The sweep's exit code: 128 + n when a signal ended it or one of its jobs, else the worst.
    """
    folder = os.environ.pop(FOLDER_VARIABLE, None)
    if folder is None:
        return code
    try:
        with signals_deferred():
            sweep = Sweep.read(Path(folder))
            code = _End(sweep, _ended_jobs(sweep), code, console).told()
            if sweep.dry_run:
                shutil.rmtree(sweep.folder, ignore_errors=True)
    except Stopped as stopped:
        return stopped.exit_code
    except UserError as error:
        console.error(str(error))
        return code or 1
    return code


def _ended_jobs(sweep: Sweep) -> list[JobRecord]:
    """The jobs when none of them runs on this host: those that still do are told to end."""
    began = time.monotonic()
    told = False
    while True:
        jobs = sweep.records()
        running = [
            job for job in jobs if job.alive and job.said.get("host") == socket.gethostname()
        ]
        waited = time.monotonic() - began
        if not running or waited > _PATIENCE_SECONDS + GRACE_SECONDS + 5:
            return jobs
        if waited > _PATIENCE_SECONDS and not told:
            told = True
            for job in running:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(job.said["pid"]), signal.SIGTERM)
        time.sleep(0.1)


class _End:
    """What is said and done at a sweep's end."""

    def __init__(self, sweep: Sweep, jobs: list[JobRecord], code: int, console: Console) -> None:
        self.sweep, self.jobs, self.console = sweep, jobs, console
        self.killed = [job for job in jobs if job.exit_code is None and not job.alive]
        self.running = [job for job in jobs if job.exit_code is None and job.alive]
        self.never = 0 if sweep.jobs is None else max(0, sweep.jobs - len(jobs))
        codes = [KILLED_CODE if job.exit_code is None else job.exit_code for job in jobs]
        codes = [code, *codes, 1 if self.never else 0]
        self.code = next((one for one in codes if one >= 128), max(codes))

    def told(self) -> int:
        if not self.jobs and self.code == 2:
            self._remove()  # Hydra refused the values of a job: nothing was begun
            return self.code
        for job in self.killed:
            self.console.error(f"{self._named(job)} was killed: it could not say how it ended.")
        for job in self.running:
            where = f"process {job.said.get('pid')} on {job.said.get('host')}"
            self.console.error(f"{self._named(job)} still runs ({where}).")
        if self.never:
            self.console.error(f"{counted(self.never, 'job')} of the sweep never began.")
        if not self.sweep.dry_run:
            self._summary()
        return self.code

    def _named(self, job: JobRecord) -> str:
        folder = job.said.get("run_folder")
        where = f" in {shortest(Path(str(folder)))}" if folder else ""
        return f"{job.words(self.sweep.swept_keys)}{where}"

    def _summary(self) -> None:
        good = sum(job.exit_code == 0 for job in self.jobs)
        total = self.sweep.jobs or len(self.jobs)
        self.console.heading(
            f"sweep ended: {good} of {counted(total, 'job')} finished, "
            f"in {shortest(self.sweep.folder)}"
        )
        for job in self.jobs:
            if job.exit_code:
                why = f": {job.said['error']}" if job.said.get("error") else ""
                words = f"{self._named(job)} ended with exit code {job.exit_code}{why}"
                self.console.line(f"  {words}")
        if page := self._close_parent():
            from runner.pipeline.record import how_to_compare

            tracking, output_dir = self.sweep.tracking, self.sweep.output_dir
            how = how_to_compare(tracking["name"], tracking["uri"], output_dir, page)
            self.console.line(f"  Compare the runs: {how}")

    def _close_parent(self) -> str | None:
        """End the parent run with what truly came of the sweep; where it is found."""
        from runner.tracking.parent_run import close_parent

        status: RunStatus = "KILLED" if self.code >= 128 else "FAILED" if self.code else "FINISHED"
        killed = [
            str(job.said["mlflow_run_id"]) for job in self.killed if job.said["mlflow_run_id"]
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
