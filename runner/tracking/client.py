"""MLflow's client, silenced, and its error messages without this process's secrets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from runner.core.errors import plain_reason
from runner.tracking.secrets import redact, secret_values

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Values that MLflow reads from the environment, most of them when it is imported.
QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# An unreachable server must cost seconds, not MLflow's seven tries of two minutes each: what could
# not be sent is kept and sent later. The user's own values win.
DEFAULT_ENVIRONMENT = {
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


def quiet() -> None:
    """Set the variables that MLflow reads at import; call this before importing it."""
    os.environ.update(QUIET_ENVIRONMENT)
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> MlflowClient:
    """Return a silent client of the store at ``uri``: no telemetry, no log lines, no git."""
    quiet()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def without_secrets(text: str) -> str:
    """Return ``text`` without secrets, including those of this process's environment."""
    return redact(text, secret_values(os.environ))


def first_line(error: BaseException) -> str:
    """Return an exception's message as one line without secrets, of at most 300 characters."""
    lines = str(error).strip().splitlines()
    return without_secrets(plain_reason(lines[0] if lines else type(error).__name__))[:300]
