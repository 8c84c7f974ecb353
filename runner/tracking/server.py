"""The check of a tracking server, and error messages that say what to do."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from runner.core.errors import UserError
from runner.core.proxy import (
    CONNECT_SECONDS,
    SCHEMES,
    proxy_failure,
    proxy_of,
    unreachable,
    wrong_proxy,
)
from runner.tracking.client import DEFAULT_ENVIRONMENT, connect, first_line, quiet, without_secrets

# For the first request only: a wrong address must not cost minutes.
_SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# Those of requests.
_PROXY_SCHEMES = (*SCHEMES, "socks4", "socks4a")
_BY_PROXY = re.compile("ProxyError|SOCKS|Tunnel connection failed|error code 407|Proxy Auth")
_CORRECT = "correct tracking.uri (or MLFLOW_TRACKING_URI), or use tracking=sqlite"


def check_server(uri: str) -> None:
    """Send the server at ``uri`` one request; takes seconds even if nothing answers.

    Raises:
        UserError: the address, the user name, the password or the server is wrong.
    """
    if uri.startswith(("http://", "https://")):
        _reach(uri)
    try:
        with _short_timeouts():
            connect(uri).search_experiments(max_results=1)
    except Exception as error:
        raise UserError(
            f"tracking server {without_secrets(uri)} {describe_failure(uri, error)}"
        ) from error


def _reach(uri: str) -> None:
    """Connect once, because MLflow's own errors hide what is wrong with an address."""
    server = f"tracking server {without_secrets(uri)}"
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        # Python's message may quote a part of the password.
        raise UserError(
            f"{server} is no address: in a password write %40 for @, %2F for / and the like; "
            f"{_CORRECT}"
        ) from error
    if not host:
        raise UserError(f"{server} names no host; {_CORRECT}")
    proxy = proxy_of(uri)
    problem = wrong_proxy(_PROXY_SCHEMES, uri) or (unreachable(proxy) if proxy else None)
    if problem:
        raise UserError(f"{server}: {problem}")
    if proxy:
        return  # it alone knows the host
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"{server}: there is no host {host}; {_CORRECT}") from error
    except ConnectionRefusedError as error:
        raise UserError(
            f"{server}: nothing listens at {host} port {port}; start the server, {_CORRECT}"
        ) from error
    except OSError as error:
        what = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise UserError(
            f"{server} can't be reached ({what}): is the server running, and the network up? "
            f"Otherwise {_CORRECT}"
        ) from error


def describe_failure(uri: str, error: Exception) -> str:
    """Describe a failed request, as the end of a sentence that begins with the server."""
    message = first_line(error)
    status = _status(error)
    if "Invalid Host header" in message:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return f"does not take requests for {host}: start it with --allowed-hosts {host}"
    said = without_secrets(str(error))
    if _BY_PROXY.search(said) and (failure := proxy_failure(uri, said.splitlines()[0])):
        return f"can't be reached: {failure}"
    if status == 401:
        return _unauthorised(uri)
    if status == 403:
        return (
            "does not let this user do that (403): ask its administrator for the EDIT permission, "
            "or choose another tracking.experiment"
        )
    if status in (502, 503, 504) or re.search("too many 50[0-9] error", message):
        return "is not ready or fails (HTTP 50x): see its log, or use tracking=sqlite"
    if "timed out" in message:
        return f"takes connections but does not answer in time; {_CORRECT}"
    if "SSLError" in message or "CERTIFICATE_VERIFY_FAILED" in message:
        return (
            "has a certificate that can't be trusted, or speaks no https: give "
            "MLFLOW_TRACKING_SERVER_CERT_PATH, or http:// in tracking.uri"
        )
    if not _is_mlflow(error, message):
        return f"answers, but not as an MLflow server does; {_CORRECT}"
    return f"does not answer as it should ({message}); {_CORRECT}"


def _unauthorised(uri: str) -> str:
    variables = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN")
    has_credentials = any(os.environ.get(name) for name in variables)
    if has_credentials or "@" in urlsplit(uri).netloc:
        return (
            "refuses this name and password (401): correct MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
        )
    return (
        "asks for a name and a password (401): set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    )


def _status(error: Exception) -> int:
    """Return the HTTP status behind an exception of MLflow's client; 0 if there is none."""
    from mlflow.exceptions import MlflowException

    return error.get_http_status_code() if isinstance(error, MlflowException) else 0


def _is_mlflow(error: Exception, message: str) -> bool:
    """Whether the answer is of MLflow's form, or there was none."""
    answer = getattr(error, "json", None)
    if isinstance(answer, dict):
        return "error_code" in answer
    return not any(
        sign in message for sign in ("!= 200", "not in a valid JSON format", "RemoteDisconnected")
    ) and not isinstance(error, ValueError)


@contextmanager
def _short_timeouts() -> Iterator[None]:
    """Shorten MLflow's timeouts, unless the user has set them."""
    quiet()
    ours = [name for name in _SHORT_TIMEOUTS if os.environ.get(name) == DEFAULT_ENVIRONMENT[name]]
    before = {name: os.environ[name] for name in ours}
    os.environ.update({name: _SHORT_TIMEOUTS[name] for name in ours})
    try:
        yield
    finally:
        os.environ.update(before)
