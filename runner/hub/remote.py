"""Queries to the Hugging Face hub: commits, file sizes, access, and downloads.

Every failure is a :class:`StageError` that says what is wrong and what to do. huggingface_hub finds
the token and sends it to the hub only; nothing here prints it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from runner.core.errors import StageError
from runner.core.proxy import proxy_failure, wrong_proxy
from runner.core.text import did_you_mean
from runner.hub.hub_cache import Request

T = TypeVar("T")

# The number of attempts, with pauses of 1, 2, 4 and 8 seconds between them.
ATTEMPTS = 5
PAUSE = 1.0
# Bytes between two reports of a download's progress.
CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub; for ``etag`` see :mod:`runner.hub.hub_cache`."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class Remote:
    """A request resolved on the hub: the commit and its wanted files."""

    request: Request
    commit: str
    files: tuple[RemoteFile, ...]


def offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def silence_warnings() -> None:
    """Silence huggingface_hub's warnings about retries and rate limits."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def look_up(request: Request) -> Remote:
    """Find the commit of a request and the sizes of its files, without downloading.

    Raises:
        StageError: a required file is not there, or the hub can't be used.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    ask = api.dataset_info if request.repo_type == "dataset" else api.model_info
    info = _with_retries(
        request,
        lambda: ask(
            request.repository,
            revision=request.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        ),
    )
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    for file in request.files:
        if file not in siblings:
            raise StageError(
                f"{request.repository} has no file {file} at {request.option}={request.revision}."
                + did_you_mean(file, siblings)
            )
    files = []
    for name, sibling in siblings.items():
        if request.matches(name):
            etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            size = sibling.lfs.size if sibling.lfs else sibling.size
            if etag is None or size is None or info.sha is None:
                raise StageError(
                    f"{constants.ENDPOINT} names no size or digest for {name} of "
                    f"{request.repository}: it is not a complete hub (HF_ENDPOINT)."
                )
            files.append(RemoteFile(name, size, etag))
    # Required files come last: once they are cached, the optional ones are too, so an interrupted
    # download never looks complete.
    files.sort(key=lambda file: (file.name in request.files, file.name))
    return Remote(request, str(info.sha), tuple(files))


def check_access(remote: Remote, file: RemoteFile) -> None:
    """Request a file's headers, because a gated repository lists files that it does not give.

    Raises:
        StageError: the file is refused, or its size is not the one that was listed.
    """
    from huggingface_hub import get_hf_file_metadata

    head = _with_retries(remote.request, lambda: get_hf_file_metadata(_url(remote, file)))
    if head.size is not None and head.size != file.size:
        raise StageError(
            f"the hub contradicts itself: {file.name} of {remote.request.repository} is listed "
            f"with {file.size} bytes and offered with {head.size}. Try again later."
        )


def download(
    remote: Remote, file: RemoteFile, partial: Path, progress: Callable[[int], None]
) -> None:
    """Download a file, resuming at the end of ``partial``; the content is not verified.

    Args:
        remote: the repository at its commit.
        file: the file.
        partial: the path of the partial download.
        progress: called with the number of bytes present.

    Raises:
        StageError: nothing more arrives. The partial download is kept.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    partial.parent.mkdir(parents=True, exist_ok=True)
    most, failures = -1, 0
    while True:
        have = partial.stat().st_size if partial.exists() else 0
        if have > file.size:
            partial.unlink()
            have = 0
        progress(have)
        if have == file.size and partial.exists():
            return
        if have > most:
            most, failures = have, 0
        elif failures == ATTEMPTS:
            raise StageError(
                f"the hub gives only {most} of the {file.size} bytes of {file.name} of "
                f"{remote.request.repository}; they are kept. Try again later."
            )
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
        failures += 1
        try:
            _stream(remote, file, partial, have, progress)
        except (httpx2.RequestError, httpx2.InvalidURL, HfHubHTTPError) as error:
            if not _is_transient(error) or failures == ATTEMPTS:
                raise StageError(error_message(error, remote.request, file.name)) from error


def _stream(
    remote: Remote, file: RemoteFile, partial: Path, have: int, progress: Callable[[int], None]
) -> None:
    """Write one response of the hub as it arrives."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    # A compressed response can't be resumed.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with (
        http_stream_backoff(
            "GET",
            _url(remote, file),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
            # The caller counts failures, because it knows whether anything arrived.
            retry_on_exceptions=(),
            retry_on_status_codes=(408, 429),
        ) as response,
        partial.open("r+b" if have else "wb") as handle,
    ):
        if response.status_code == 416:  # Our partial file is longer: start again.
            handle.truncate(0)
            return
        hf_raise_for_status(response)
        if response.status_code == 206:
            begins = response.headers.get("Content-Range", "").removeprefix("bytes ")
            if not begins.startswith(f"{have}-"):
                handle.truncate(0)
                return
            handle.seek(have)
        else:  # The complete file, requested or not.
            handle.truncate(0)
            have = 0
        reported_at = have
        # No chunk size: a lost connection would lose what was gathered for a chunk.
        for piece in response.iter_bytes():
            handle.write(piece)
            have += len(piece)
            if have - reported_at >= CHUNK or have >= file.size:
                reported_at = have
                progress(min(have, file.size))
            if have > file.size:
                raise StageError(
                    f"the hub sends more than the {file.size} bytes that it names for "
                    f"{file.name} of {remote.request.repository}. Try again later."
                )


def _url(remote: Remote, file: RemoteFile) -> str:
    from huggingface_hub import hf_hub_url

    request = remote.request
    return hf_hub_url(
        request.repository, file.name, repo_type=request.repo_type, revision=remote.commit
    )


def _with_retries(request: Request, call: Callable[[], T]) -> T:
    """Call ``call``, with retries after transient errors."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    _check_proxies()
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (httpx2.RequestError, httpx2.InvalidURL, HfHubHTTPError) as error:
            if not _is_transient(error) or attempt == ATTEMPTS - 1:
                raise StageError(error_message(error, request)) from error
            time.sleep(PAUSE * 2**attempt)
        except JSONDecodeError as error:
            raise StageError(
                f"{constants.ENDPOINT} does not answer as a hub does: check "
                "HF_ENDPOINT, and whether this network wants you to log in first."
            ) from error
        except ValueError as error:  # not a valid name
            raise StageError(
                f"{request.repository} can't be looked up: {_reason(error)}"
            ) from error
    raise AssertionError("unreachable")


def _check_proxies() -> None:
    """Refuse what httpx would raise a ValueError for, which quotes the address."""
    from huggingface_hub import constants

    if wrong := wrong_proxy():
        raise StageError(f"{constants.ENDPOINT} can't be asked: {wrong}.")


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import httpx2

    if isinstance(error, httpx2.ProxyError):
        return False
    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol)
    status = _status(error)
    return status is not None and (status >= 500 or status in (408, 429))


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def error_message(error: Exception, request: Request, file: str | None = None) -> str:
    """Describe a failure of the hub, in one line."""
    import httpx2
    from huggingface_hub import constants, errors, get_token

    endpoint, repository = constants.ENDPOINT, request.repository
    page = f"{endpoint}/{'datasets/' if request.repo_type == 'dataset' else ''}{repository}"
    what = "dataset" if request.repo_type == "dataset" else "repository"
    token = "the token in use does not open it" if get_token() else "no token is set"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated and {token}: accept its terms at {page}, then "
            "log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repository} has no branch, tag or commit {request.revision}: check {request.option}."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repository} has no file {file or ''} at {request.option}={request.revision}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {what} {repository} at {endpoint}, or it is private and {token}."
    status = _status(error)
    if status == 407 or isinstance(error, httpx2.TransportError):
        reason = _reason(error) if status is None else "407"
        if failure := proxy_failure(endpoint, reason):
            return f"{endpoint} can't be reached: {failure}." + _KEPT
    if status in (401, 403):
        return (
            f"{endpoint} refuses {repository} (HTTP {status}) and {token}: log in with "
            "`hf auth login` or set HF_TOKEN to a token that may read it."
        )
    if status is not None:
        return f"{endpoint} answers HTTP {status} for {repository}. Try again later." + _KEPT
    return f"{endpoint} can't be reached ({_reason(error)}): check the connection." + _KEPT


_KEPT = " What was downloaded is kept."


def _reason(error: Exception) -> str:
    """Return the first line of an error, unless it quotes headers, which hold the token."""
    import httpx2

    if isinstance(error, httpx2.LocalProtocolError | UnicodeError):
        return "the token in use has characters that can't be sent"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
