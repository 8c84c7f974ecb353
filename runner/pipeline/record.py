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
from typing import TYPE_CHECKING, Any, Literal

from runner.config.composed import Composed
from runner.config.schema import RunConfig, TrackingConfig
from runner.core.atomic import write_text
from runner.core.errors import UserError
from runner.core.paths import checkout, command_here
from runner.engines.base import Engine
from runner.pipeline.digests import fingerprint, resume_key
from runner.pipeline.model import Inputs, Plan
from runner.tracking.client import safe
from runner.tracking.files import hide_values
from runner.tracking.secrets import secret_values

if TYPE_CHECKING:
    from runner.tracking.mlflow_run import NullWriter, RunWriter
    from runner.tracking.multirun import Job

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# Files of the run's folder that MLflow keeps as artifacts, beside the LoRA files and the logs.
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
_LORAS = ("lora.safetensors", "lora_comfyui.safetensors")


def tracking_uri(tracking: TrackingConfig, root: Path) -> str | None:
    """Where MLflow keeps the runs; None for ``tracking=none``."""
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
    """The command or the address that shows a run beside the others.

    Args:
        name: The option ``tracking.name``.
        uri: The option ``tracking.uri``.
        output_dir: The option ``output_dir``, as it was typed.
        page: The run's page on a server.
    """
    if name == "server":
        return page
    if uri:
        return f"{command_here('runner.ui')} --tracking-uri {shlex.quote(safe(uri))}"
    option = "" if output_dir == "outputs" else f" --outputs {shlex.quote(output_dir)}"
    return f"{command_here('runner.ui')}{option}"


def check_tracking(config: RunConfig) -> None:
    """Refuses a server that can't be used before media are read, which may take long."""
    if config.tracking.name == "server" and not config.dry_run:
        from runner.tracking.server import check_server

        check_server(_server_uri(config.tracking))


class Recorder:
    """Writes down what happens to a run while it happens."""

    def __init__(self, writer: RunWriter | NullWriter, run_dir: Path, key: str) -> None:
        """``key`` is the run's resume key."""
        self.writer, self.run_dir = writer, run_dir
        self._stages: dict[str, float] = {}
        self._started = time.time()
        self._key = key
        self._fingerprint: str | None = None
        self._problems: list[str] = []
        self._write("RUNNING", "")

    @property
    def problems(self) -> list[str]:
        """What could not be written down, one line each."""
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
        """Start the MLflow run, under its sweep's parent when there is one."""
        from runner.tracking import mlflow_run, mlflow_store
        from runner.tracking.parent_run import child_tags, open_parent

        config, resolved, choices = composed.config, composed.resolved, composed.choices
        key = resume_key(inputs)
        uri = tracking_uri(config.tracking, inputs.root)
        if uri is None:
            if job is not None:
                job.note(run_folder=str(run_dir))
            return cls(mlflow_run.NullWriter(), run_dir, key)
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
                f"{k.rsplit('.', 1)[-1]}={_value(resolved, choices, k)}" for k in sweep.swept_keys
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
        return cls(writer, run_dir, key)

    def result_of(self, inputs: Inputs, plan: Plan, engine: Engine) -> None:
        """Note what gives the run's result; again when that has changed, or has become known."""
        found = fingerprint(inputs, plan, engine)
        if found not in (None, self._fingerprint):
            self._fingerprint = found
            self._write("RUNNING", "")
            self.writer.set_tags({"config.fingerprint": found})

    def files(self) -> None:
        """Send the files that say what the run is; again when they changed."""
        for name in _ARTIFACTS:
            if (self.run_dir / name).is_file():
                self.writer.log_artifact(self.run_dir / name)

    def stage(self, name: str, seconds: float) -> None:
        """A stage has ended, well or not."""
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
        """Settle how the run ended, first in its folder, then in MLflow."""
        why = safe(why)
        self._write(status, why)
        with self.writer.queued():
            self.files()
            for name in _LORAS:
                if (self.run_dir / name).is_file():
                    self.writer.log_artifact(self.run_dir / name)
            if why:
                self.writer.set_tags({"run.error": why})
        self.writer.finish(status)

    def _write(self, status: str, why: str) -> None:
        record = {
            "status": status,
            "error": why,
            "config_fingerprint": self._fingerprint,
            "resume_key": self._key,
            "mlflow_run_id": self.writer.run_id,
            "started": self._started,
            "seconds": round(time.time() - self._started, 3),
            "stages": self._stages,
            "pid": os.getpid(),
        }
        file = self.run_dir / "run.json"
        with self.tolerant(file):
            write_text(file, json.dumps(record, indent=1) + "\n")

    @contextmanager
    def tolerant(self, file: Path) -> Iterator[None]:
        """Inside, that ``file`` can't be written is a problem to be told of at the end, no failure.

        A full disk must neither hide why a run failed nor keep its end from MLflow.
        """
        try:
            yield
        except OSError as error:
            self._problem(f"{file} could not be written ({error.strerror or error})")


def _value(resolved: Mapping[str, Any], choices: Mapping[str, str], key: str) -> Any:
    """A swept key's value in this run: a group's choice, or an option's value."""
    if key in choices:
        return choices[key]
    value: Any = resolved
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def host_tags(inputs: Inputs, engine: Engine, plan: Plan) -> dict[str, str]:
    """Where a run ran and with what, for MLflow."""
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
    """The checkout's commit, with a mark when files differ from it; the version when installed."""
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
    """What MLflow shows as parameters: the groups chosen, and every option that is set."""
    params: dict[str, Any] = {
        group: choice
        for group, choice in composed.choices.items()
        if not group.startswith("hydra/") and choice not in (None, "None", "null")
    }
    for key, value in _flat(composed.resolved):
        if key in ("dry_run", "name", "output_dir") or value in (None, "", [], {}):
            continue
        if key.rsplit(".", 1)[-1] == "name" or key.startswith(("tracking.", "stages.")):
            continue
        params[key] = value
    params["training.seed"] = inputs.seed
    params["memory.tier"] = inputs.memory.name
    return params


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _flat(value, f"{prefix}{key}.")
        else:
            leaves.append((prefix + key, value))
    return leaves
