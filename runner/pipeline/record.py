"""The record of a run: its MLflow run, and ``run.json`` in its folder."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.composed import Composed
from runner.config.schema import RunConfig, TrackingConfig
from runner.core.atomic import write_text
from runner.core.errors import UserError
from runner.core.paths import checkout, command_here
from runner.engines.base import Engine
from runner.pipeline.digests import fingerprint, resume_key
from runner.pipeline.model import Inputs, Plan
from runner.tracking.client import without_secrets
from runner.tracking.files import hide_values
from runner.tracking.secrets import secret_values

if TYPE_CHECKING:
    from runner.tracking.mlflow_run import NullWriter, RunStatus, RunWriter
    from runner.tracking.multirun import Job

# Files of the run's folder that MLflow keeps as artifacts, besides the LoRA files and the logs.
_ARTIFACTS = (
    "config.yaml",
    "overrides.txt",
    "commands.sh",
    "weights.json",
    "dataset.toml",
    "validation.toml",
    "train.toml",
    "sample_prompts.txt",
    "accelerate.yaml",
    "evaluation.json",
)
_LORA_FILES = ("lora.safetensors", "lora_comfyui.safetensors")


def tracking_uri(tracking: TrackingConfig, root: Path) -> str | None:
    """Return MLflow's tracking URI; None for ``tracking=none``.

    Raises:
        UserError: ``tracking=server`` has no address.
    """
    if tracking.name == "none":
        return None
    from runner.tracking.mlflow_store import sqlite_uri

    if tracking.name == "sqlite":
        return tracking.uri or sqlite_uri(root)
    return _server_uri(tracking)


def _server_uri(tracking: TrackingConfig) -> str:
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "tracking=server needs an address: set tracking.uri=http://host:5000 or the variable "
            "MLFLOW_TRACKING_URI."
        )
    return uri


def how_to_compare(name: str, uri: str | None, output_dir: str, page: str) -> str:
    """Return the command or address that shows a run next to the others.

    Args:
        name: the option ``tracking.name``.
        uri: the option ``tracking.uri``.
        output_dir: the option ``output_dir``, as typed.
        page: the run's page on a server.
    """
    if name == "server":
        return page
    if uri:
        return f"{command_here('runner.ui')} --tracking-uri {shlex.quote(without_secrets(uri))}"
    option = "" if output_dir == "outputs" else f" --outputs {shlex.quote(output_dir)}"
    return f"{command_here('runner.ui')}{option}"


def check_tracking(config: RunConfig) -> None:
    """Check the tracking server before media are read, which may take long.

    Raises:
        UserError: the server cannot be used.
    """
    if config.tracking.name == "server" and not config.dry_run:
        from runner.tracking.server import check_server

        check_server(_server_uri(config.tracking))


class Recorder:
    """The record of a run in progress, in ``run.json`` and in MLflow."""

    def __init__(
        self,
        writer: RunWriter | NullWriter,
        run_dir: Path,
        resume_key: str,
        engine_version: str,
    ) -> None:
        """Start the record, in a run's folder, with its resume key and its engine's version."""
        self.writer, self.run_dir = writer, run_dir
        self._stages: dict[str, float] = {}
        self._started = time.time()
        self._resume_key, self._engine_version = resume_key, engine_version
        self._fingerprint: str | None = None
        self._plan: Plan | None = None
        self._local_weights: list[dict[str, str | int | None]] = []
        self._problems: list[str] = []
        self._write("RUNNING", "")

    @property
    def problems(self) -> list[str]:
        """What could not be recorded, one line each."""
        return [*self._problems, *(f"MLflow: {problem}" for problem in self.writer.problems)]

    def _problem(self, line: str) -> None:
        if line not in self._problems:
            self._problems.append(line)

    @classmethod
    def open(
        cls,
        composed: Composed,
        inputs: Inputs,
        engine: Engine,
        plan: Plan,
        run_dir: Path,
        job: Job | None,
    ) -> Recorder:
        """Start the MLflow run, as a child of its sweep's run if there is a sweep.

        Raises:
            UserError: the tracking store cannot be used.
        """
        from runner.tracking import mlflow_run, mlflow_store
        from runner.tracking.parent_run import child_tags, open_parent

        config, resolved, choices = composed.config, composed.resolved, composed.choices
        key, version = resume_key(inputs, engine), engine.full_version(inputs.engine)
        uri = tracking_uri(config.tracking, inputs.root)
        if uri is None:
            if job is not None:
                job.note(run_folder=str(run_dir))
            return cls(mlflow_run.NullWriter(), run_dir, key, version)
        experiment = config.tracking.experiment
        mlflow_store.initialise(uri, inputs.root)
        tags = {
            **host_tags(inputs, engine, plan),
            "config.resume_key": key,
            "run.folder": str(run_dir),
        }
        name, parent = plan.name, None
        if job is not None:
            sweep = job.sweep
            parent = open_parent(
                uri,
                experiment,
                outputs=inputs.root,
                folder=sweep.folder,
                sweep_id=sweep.id,
                name="sweep " + " ".join(sweep.swept_keys or sweep.overrides),
                tags={"sweep.overrides": " ".join(sweep.overrides)},
            )
            tags |= child_tags(parent, sweep.id)
            values = [
                f"{k.rsplit('.', 1)[-1]}={_swept_value(resolved, choices, k)}"
                for k in sweep.swept_keys
            ]
            name = " ".join([name, *values])
        writer = mlflow_run.RunWriter.start(
            uri,
            experiment,
            outputs=inputs.root,
            name=name,
            params=parameters(composed, inputs),
            tags=tags,
            parent_id=parent,
        )
        if job is not None:
            job.note(run_folder=str(run_dir), mlflow_run_id=writer.run_id)
        return cls(writer, run_dir, key, version)

    def record_fingerprint(self, inputs: Inputs, plan: Plan, engine: Engine) -> None:
        """Record the digest of what the result depends on, once it is known and when it changes."""
        if plan is self._plan:
            return
        self._plan = plan
        self._local_weights = [file.record() for file in inputs.weights.local]
        digest = fingerprint(inputs, plan, engine)
        if digest not in (None, self._fingerprint):
            self._fingerprint = digest
            self._write("RUNNING", "")
            self.writer.set_tags({"config.fingerprint": digest})

    def send_files(self) -> None:
        """Send the files that describe the run to MLflow, also after they have changed."""
        for name in _ARTIFACTS:
            if (self.run_dir / name).is_file():
                self.writer.log_artifact(self.run_dir / name)

    def record_stage(self, name: str, seconds: float) -> None:
        """Record that a stage has ended, successfully or not."""
        self._stages[name] = round(seconds, 3)
        self._write("RUNNING", "")
        log = self.run_dir / "logs" / f"{name}.log"
        try:
            hide_values(log, secret_values(os.environ))
        except OSError as error:
            self._problem(f"secrets in {log} could not be hidden ({error.strerror or error})")
        if log.is_file():
            self.writer.log_artifact(log, "logs")

    def finish(self, status: RunStatus, why: str) -> None:
        """Record the final status, first in ``run.json``, then in MLflow."""
        why = without_secrets(why)
        self._write(status, why)
        with self.writer.queued():
            self.send_files()
            for name in _LORA_FILES:
                if (self.run_dir / name).is_file():
                    self.writer.log_artifact(self.run_dir / name)
            if why:
                self.writer.set_tags({"run.error": why})
        self.writer.finish(status)

    def _write(self, status: str, why: str) -> None:
        record: dict[str, Any] = {
            "status": status,
            "error": why,
            "config_fingerprint": self._fingerprint,
            "resume_key": self._resume_key,
            "engine_version": self._engine_version,
            "mlflow_run_id": self.writer.run_id,
            "started": self._started,
            "seconds": round(time.time() - self._started, 3),
            "stages": self._stages,
            "pid": os.getpid(),
        }
        if self._local_weights:
            record["local_weights"] = self._local_weights
        file = self.run_dir / "run.json"
        with self.tolerant(file):
            write_text(file, json.dumps(record, indent=1) + "\n")

    @contextmanager
    def tolerant(self, file: Path) -> Iterator[None]:
        """Treat errors of writing ``file`` in the block as problems to report, not as failures.

        A full disk must neither hide why a run failed nor keep its status from MLflow.
        """
        try:
            yield
        except OSError as error:
            self._problem(f"{file} could not be written ({error.strerror or error})")


def _swept_value(resolved: Mapping[str, Any], choices: Mapping[str, str], key: str) -> Any:
    """Return the value of a swept key in this run: the choice of a group, or an option's value."""
    if key in choices:
        return choices[key]
    value: Any = resolved
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def host_tags(inputs: Inputs, engine: Engine, plan: Plan) -> dict[str, str]:
    """Return MLflow tags for the computer, the versions and the dataset of a run."""
    from runner import __version__

    return {
        "runner.version": __version__,
        "runner.commit": code_version(),
        "engine": engine.name,
        "engine.version": engine.full_version(inputs.engine),
        "dataset.fingerprint": plan.fingerprint,
        "host": socket.gethostname(),
        "gpu": inputs.gpu.name if inputs.gpu else "none",
        "python": ".".join(str(part) for part in sys.version_info[:3]),
    }


def code_version() -> str:
    """Describe the runner's version.

    Returns:
        The checkout's commit, marked if files differ from it; the package's version if installed.
    """
    from runner import __version__

    top = checkout()
    if top is None:
        return __version__
    try:
        done = subprocess.run(
            ["git", "-C", top, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return __version__
    return done.stdout.strip()


def parameters(composed: Composed, inputs: Inputs) -> dict[str, Any]:
    """Return MLflow's parameters: the chosen groups, and every option that is set."""
    params: dict[str, Any] = {
        group: choice
        for group, choice in composed.choices.items()
        if not group.startswith("hydra/") and choice not in (None, "None", "null")
    }
    for key, value in _leaves(composed.resolved):
        if key in ("dry_run", "name", "output_dir") or value in (None, "", [], {}):
            continue
        if key.rsplit(".", 1)[-1] == "name" or key.startswith(("tracking.", "stages.")):
            continue
        params[key] = value
    params["training.seed"] = inputs.seed
    params["memory.tier"] = inputs.memory.name
    return params


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((prefix + key, value))
    return leaves
