"""The writer of one MLflow run.

After a run is started no method raises: hours of training must not be lost because a tracking
server is down. What could not be sent is kept and sent with the next call; every problem is listed,
one line each, in ``RunWriter.problems``.
"""

from __future__ import annotations

import getpass
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from runner.core.errors import UserError
from runner.tracking import mlflow_store
from runner.tracking.client import connect, first_line, without_secrets
from runner.tracking.files import write_redacted
from runner.tracking.metrics import Point, clean_metric_name
from runner.tracking.secrets import redact, redact_mapping, secret_values
from runner.tracking.server import describe_failure

if TYPE_CHECKING:
    from mlflow import MlflowClient

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM = 6000  # characters MLflow keeps of a parameter's value
MAX_TAG = 8000
MAX_POINTS = 1000  # in one request
# The pause after a failed call, which is longer if the call itself took longer.
PAUSE_SECONDS = 10.0
FINISH_WAIT_SECONDS = 2.0

# Text files, which are redacted before they are stored.
_TEXT_SUFFIXES = frozenset(
    (".csv", ".html", ".json", ".jsonl", ".log", ".md", ".sh", ".toml", ".txt", ".yaml", ".yml")
)

# MLflow's error codes after which the same request would be refused again.
_REFUSALS = frozenset(
    ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
)


class Writer(Protocol):
    """The methods that ``RunWriter`` and ``NullWriter`` share."""

    run_id: str
    problems: list[str]

    @property
    def url_hint(self) -> str: ...
    def log_params(self, params: Mapping[str, object]) -> None: ...
    def set_tags(self, tags: Mapping[str, object]) -> None: ...
    def log_points(self, points: Sequence[Point]) -> None: ...
    def log_artifact(self, file: Path, folder: str | None = None) -> None: ...
    def log_text(self, text: str, name: str) -> None: ...
    def queued(self) -> AbstractContextManager[None]: ...
    def finish(self, status: RunStatus) -> None: ...


class NullWriter:
    """A writer that discards everything (tracking=none)."""

    run_id = ""
    url_hint = ""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def log_params(self, params: Mapping[str, object]) -> None: ...
    def set_tags(self, tags: Mapping[str, object]) -> None: ...
    def log_points(self, points: Sequence[Point]) -> None: ...
    def log_artifact(self, file: Path, folder: str | None = None) -> None: ...
    def log_text(self, text: str, name: str) -> None: ...
    def queued(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self, status: RunStatus) -> None: ...


class RunWriter:
    """A writer of one MLflow run, which it addresses by its id; any thread may call it.

    MLflow's fluent API, with its one active run per process, is never used.
    """

    def __init__(
        self, client: MlflowClient, uri: str, run_id: str, experiment_id: str, outputs: Path
    ) -> None:
        self.run_id = run_id
        self.problems: list[str] = []
        self.not_finite = 0  # points logged whose value was NaN or infinite
        self._client = client
        self._uri = uri
        self._experiment_id = experiment_id
        self._outputs = outputs
        self._secrets = secret_values(os.environ)
        self._points: list[Point] = []
        self._calls: list[tuple[str, Callable[[], object]]] = []
        self._finished = False
        self._paused_until = 0.0  # on time.monotonic's clock
        # Reentrant, since a signal handler may finish the run in the middle of another call.
        self._lock = threading.RLock()

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        *,
        outputs: Path,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        parent_id: str | None = None,
    ) -> RunWriter:
        """Start a run in ``experiment``, which is created if it is missing.

        Args:
            uri: the address of a store that was initialised.
            experiment: the experiment's name.
            outputs: the folder that ``mlartifacts`` is in, if the store is not a server.
            name: the run's name.
            params: Parameters, see :meth:`log_params`.
            tags: Tags, see :meth:`set_tags`.
            parent_id: the id of the run that becomes its parent.

        Raises:
            UserError: the store refused.
        """
        root = None if _is_server(uri) else mlflow_store.artifact_root(outputs)
        experiment_id = mlflow_store.ensure_experiment(uri, experiment, root)
        client = connect(uri)
        mlflow_tags = {
            "mlflow.source.name": "runner",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
        }
        if parent_id is not None:
            mlflow_tags[PARENT_TAG] = parent_id
        try:
            run = client.create_run(experiment_id, tags=mlflow_tags, run_name=without_secrets(name))
        except Exception as error:
            if _is_server(uri):
                description = (
                    f"tracking server {without_secrets(uri)} {describe_failure(uri, error)}"
                )
                raise UserError(f"{description} (experiment {experiment})") from error
            message = first_line(error)
            raise UserError(f"cannot start an MLflow run: {message}") from error
        writer = cls(client, uri, run.info.run_id, experiment_id, outputs)
        writer.set_tags(tags)
        writer.log_params(params)
        return writer

    @property
    def url_hint(self) -> str:
        """The address of the run's page on the server, or the command that opens the UI."""
        page = f"#/experiments/{self._experiment_id}/runs/{self.run_id}"
        if _is_server(self._uri):
            return f"{without_secrets(self._uri).rstrip('/')}/{page}"
        return f"python -m runner.ui --outputs '{self._outputs}' ({page})"

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters; nested mappings as ``a.b``, values as in YAML."""
        from mlflow.entities import Param

        values = [
            Param(clean_metric_name(key), _cut(text, MAX_PARAM))
            for key, text in self._texts(params).items()
        ]
        for part in _chunks(values, 100):
            self._call("parameters", partial(self._batch, params=part))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, replacing earlier values."""
        from mlflow.entities import RunTag

        values = [
            RunTag(clean_metric_name(key), _cut(text, MAX_TAG))
            for key, text in self._texts(tags).items()
        ]
        for part in _chunks(values, 100):
            self._call("tags", partial(self._batch, tags=part))

    def log_points(self, points: Sequence[Point]) -> None:
        """Send metric points, 1000 per request, after those kept from failed calls.

        NaN is stored as NaN, infinities as MLflow's +-1.8e308. A point that is sent twice is stored
        once, because it carries its own time.
        """
        with self._lock:
            self._points.extend(points)
            self._drain()

    def log_artifact(self, file: Path, folder: str | None = None) -> None:
        """Copy ``file`` to the run's artifacts; secrets in text files are hidden first."""
        self._call(f"artifact {file.name}", lambda: self._store_file(file, folder))

    def log_text(self, text: str, name: str) -> None:
        """Store ``text`` without its secrets as the artifact ``name``, which may have folders."""
        text = redact(text, self._secrets)
        self._call(
            f"artifact {name}", lambda: self._client.log_text(self.run_id, text, artifact_file=name)
        )

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Queue the calls made in the block; the next call after it sends them."""
        with self._lock:
            before, self._paused_until = self._paused_until, math.inf
            try:
                yield
            finally:
                self._paused_until = before

    def finish(self, status: RunStatus) -> None:
        """Send what is queued and end the run with ``status``; later calls do nothing.

        An unreachable store is tried only twice, since each try may take minutes.
        """
        with self._lock:
            if self._finished:
                return
            self._finished = True
            if self.not_finite:
                with self.queued():
                    self.set_tags({"runner.not_finite_points": self.not_finite})
            ended = int(time.time() * 1000)
            status_call = (
                "status",
                lambda: self._client.set_terminated(self.run_id, status, ended),
            )
            self._calls.append(status_call)
            self._paused_until = 0.0
            self._drain()
            if not self._calls and not self._points:
                return
            time.sleep(FINISH_WAIT_SECONDS)
            # The status goes first: it must be right even if nothing else can be sent.
            self._paused_until = 0.0
            if self._attempt(*self._calls[-1]):
                del self._calls[-1]
                self._drain()
            if unsent := [what for what, _ in self._calls]:
                self._note(f"not sent to MLflow: {', '.join(dict.fromkeys(unsent))}")
            if self._points:
                self._note(f"{len(self._points)} metric points were not sent to MLflow")

    # -- sending ---------------------------------------------------------------------------

    def _call(self, what: str, call: Callable[[], object]) -> None:
        with self._lock:
            self._calls.append((what, call))
            self._drain()

    def _drain(self) -> None:
        """Send the points, then the other calls in order, until one fails."""
        if time.monotonic() < self._paused_until:
            return
        while self._points:
            part = self._points[:MAX_POINTS]
            if not self._attempt("metrics", partial(self._send_points, part)):
                return
            self.not_finite += sum(not math.isfinite(point.value) for point in part)
            del self._points[: len(part)]
        while self._calls and self._attempt(*self._calls[0]):
            del self._calls[0]

    def _attempt(self, what: str, call: Callable[[], object]) -> bool:
        """Make a call; after a transient error, pause the sending and return False."""
        began = time.monotonic()
        try:
            call()
        except Exception as error:
            transient = _is_transient(error)
            how = "not sent to MLflow yet" if transient else "rejected by MLflow"
            self._note(f"{what} {how}: {first_line(error)}")
            if transient:
                now = time.monotonic()
                self._paused_until = now + max(PAUSE_SECONDS, now - began)
            return not transient
        return True

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _send_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        self._batch(
            metrics=[
                Metric(clean_metric_name(p.key), p.value, max(0, p.timestamp_ms), p.step)
                for p in points
            ]
        )

    def _batch(self, **batch: list) -> None:
        """Log metrics, params or tags; halve a refused batch until only refused values are left."""
        try:
            self._client.log_batch(self.run_id, **batch, synchronous=True)
        except Exception as error:
            [(category, values)] = batch.items()
            if _is_transient(error) or len(values) < 2:
                raise
            half = len(values) // 2
            refused: list[Exception] = []
            for part in (values[:half], values[half:]):
                try:
                    self._batch(**{category: part})
                except Exception as part_error:
                    if _is_transient(part_error):
                        raise
                    refused.append(part_error)
            if refused:
                raise refused[0] from error

    def _store_file(self, file: Path, folder: str | None) -> None:
        with tempfile.TemporaryDirectory() as work:
            if file.suffix.lower() in _TEXT_SUFFIXES:
                copy = Path(work) / file.name
                file = copy if write_redacted(file, copy, self._secrets) else file
            self._client.log_artifact(self.run_id, str(file), folder)

    def _texts(self, values: Mapping[str, object]) -> dict[str, str]:
        flat: dict[str, object] = {}
        _flatten("", redact_mapping(values, self._secrets), flat)
        return {key: _text(value) for key, value in flat.items()}


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks", "uc"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"


def _is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later: the store is unreachable or busy."""
    from requests import RequestException

    if isinstance(error, RequestException):  # MLflow lets these through for artifacts
        http_status = 0 if error.response is None else error.response.status_code
        return http_status not in range(400, 500) or http_status in (401, 403, 408, 429)
    if isinstance(error, OSError | ValueError | TypeError):
        return isinstance(error, ConnectionError | TimeoutError)
    return getattr(error, "error_code", None) not in _REFUSALS


def _chunks(values: list, size: int) -> list[list]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _flatten(prefix: str, value: object, into: dict[str, object]) -> None:
    if isinstance(value, Mapping) and value:
        for key, element in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), element, into)
    elif prefix:
        into[prefix] = value


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(element) for element in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(element)}" for key, element in value.items()) + "}"
    return str(value)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    marker = f" ... [cut, {len(text):,} characters in all]"
    return text[: limit - len(marker)] + marker
