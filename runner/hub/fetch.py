"""Downloads from the Hugging Face hub: check access and space, fetch what is missing, verify."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.core.errors import StageError
from runner.core.text import counted, readable
from runner.hub.hub_cache import HubCache, HubFile, Request, read_sha256
from runner.hub.progress import DownloadListener
from runner.hub.remote import Remote, RemoteFile, check_access, download, look_up, offline

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class FetchedFile:
    """A verified file in the Hugging Face cache, and where it is from."""

    repository: str
    revision: str
    commit: str
    file: str
    size: int
    sha256: str
    option: str
    path: Path


@dataclass(frozen=True)
class _Missing:
    """A file to download, with the paths of its blob and of the partial download."""

    remote: Remote
    file: RemoteFile
    blob: Path

    @property
    def partial(self) -> Path:
        """The partial download, under the name that older huggingface_hub versions resume from."""
        return self.blob.with_name(self.blob.name + ".incomplete")

    @property
    def description(self) -> str:
        return f"{self.file.name} of {self.remote.request.repository}"

    @property
    def downloaded(self) -> int:
        """The number of bytes downloaded so far."""
        return min(self.file.size, _size(self.partial))


def fetch_files(
    requests: Sequence[Request],
    hub_cache: HubCache,
    watcher: DownloadListener,
    *,
    force: bool = False,
) -> list[FetchedFile]:
    """Make sure that every requested file is in the Hugging Face cache and verified.

    Args:
        requests: the files, for each repository. If all files of a request are cached, the hub is
            not asked, even if the branch has moved.
        hub_cache: the Hugging Face cache.
        watcher: listens to what happens.
        force: ask the hub anyway, and verify every file again.

    Returns:
        The files, see :func:`recorded`.

    Raises:
        StageError: with a message of one line. A missing repository, file or revision, no access,
            no network and no disk space are noticed before the download starts.
    """
    for request in requests:
        _verify_present_files(request, hub_cache, watcher, again=force)
    missing_files = [request for request in requests if hub_cache.missing_files(request)]
    if not offline():
        _fetch([look_up(one) for one in (requests if force else missing_files)], hub_cache, watcher)
    elif missing_files:
        raise StageError(_missing_offline_message(missing_files, hub_cache))
    for request in requests:
        _point_branch(request, hub_cache, watcher)
        # Without symbolic links, a file's path has changed.
        _verify_present_files(request, hub_cache, watcher, again=False)
    fetched = recorded(requests, hub_cache)
    if fetched is None or any(map(hub_cache.missing_files, requests)):
        raise StageError("files of the hub were changed while they were fetched: start again.")
    return fetched


def recorded(requests: Sequence[Request], hub_cache: HubCache) -> list[FetchedFile] | None:
    """Return the cached files of ``requests``, or None if one of them was never verified."""
    fetched = []
    for request in requests:
        repository, revision = request.repository, request.revision
        commit = hub_cache.commit(repository, revision) or ""
        for name, hub_file in hub_cache.here(request).items():
            sha256, size = hub_cache.known_sha256(hub_file), _size(hub_file.blob)
            if sha256 is None:
                return None
            option, path = request.option, hub_file.path
            fetched.append(
                FetchedFile(repository, revision, commit, name, size, sha256, option, path)
            )
    return fetched


def _fetch(remotes: Sequence[Remote], hub_cache: HubCache, watcher: DownloadListener) -> None:
    """Download what is missing of ``remotes``, and point their revisions at it."""
    todo = []
    for remote in remotes:
        missing = _missing(remote, hub_cache, watcher)
        if missing:
            check_access(remote, missing[0].file)
        todo += missing
    _download_all(todo, hub_cache, watcher)
    for remote in remotes:
        repository = remote.request.repository
        for file in remote.files:
            if hub_cache.find(repository, remote.commit, file.name) is None:
                hub_cache.link(repository, remote.commit, file.name, file.etag)
        hub_cache.point(repository, remote.request.revision, remote.commit)


def _verify_present_files(
    request: Request, hub_cache: HubCache, watcher: DownloadListener, *, again: bool
) -> None:
    for name, hub_file in hub_cache.here(request).items():
        _verify(hub_file, f"{name} of {request.repository}", hub_cache, watcher, again=again)


def _verify(
    hub_file: HubFile,
    what: str,
    hub_cache: HubCache,
    watcher: DownloadListener,
    *,
    again: bool = False,
) -> bool:
    """Verify a cached file unless that was done before, and delete it if it is damaged.

    Returns:
        Whether the file is valid.
    """
    if not again and hub_cache.known_sha256(hub_file):
        return True
    size = _size(hub_file.blob)
    sha256, right = read_sha256(
        hub_file.blob, hub_file.etag, lambda done: watcher.checking(what, done, size)
    )
    if right:
        hub_cache.remember(hub_file.blob, sha256)
        return True
    damaged = f"{what} is damaged: the content of {hub_file.blob} does not match its hash"
    if offline():
        raise StageError(f"{damaged}. Run once without HF_HUB_OFFLINE to fetch it again.")
    watcher.line(f"{damaged}. It is deleted and fetched again.")
    hub_file.blob.unlink()
    return False


def _missing_offline_message(requests: Sequence[Request], hub_cache: HubCache) -> str:
    parts = "; ".join(
        f"{', '.join(hub_cache.missing_files(request))} of {request.repository} "
        f"({request.revision})"
        for request in requests
    )
    return (
        f"HF_HUB_OFFLINE is set and the Hugging Face cache ({hub_cache.folder}) lacks {parts}. "
        "Run once without it, or copy a cache that has them."
    )


def _missing(remote: Remote, hub_cache: HubCache, watcher: DownloadListener) -> list[_Missing]:
    repository = remote.request.repository
    files = [
        _Missing(remote, file, hub_cache.blob(repository, file.etag))
        for file in remote.files
        if hub_cache.find(repository, remote.commit, file.name) is None
    ]
    # The same blob may be cached for another revision.
    return [one for one in files if not _has_blob(one, hub_cache, watcher)]


def _has_blob(one: _Missing, hub_cache: HubCache, watcher: DownloadListener) -> bool:
    hub_file = HubFile(one.blob, one.blob, one.file.etag)
    return one.blob.is_file() and _verify(hub_file, one.description, hub_cache, watcher)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _download_all(todo: Sequence[_Missing], hub_cache: HubCache, watcher: DownloadListener) -> None:
    if not todo:
        return
    missing_bytes = sum(one.file.size - one.downloaded for one in todo)
    free = free_space(hub_cache.folder)
    if missing_bytes > free:
        raise StageError(
            f"{counted(len(todo), 'file')} ({readable(missing_bytes)}) must be fetched, and only "
            f"{readable(free)} are free at {hub_cache.folder}: free some, or put the cache "
            "elsewhere with HF_HOME."
        )
    watcher.begin([(one.file.name, one.file.size, one.downloaded) for one in todo])
    for number, one in enumerate(todo):
        try:
            _download_one(number, one, hub_cache, watcher)
        except OSError as error:
            if error.errno in _FULL:
                raise StageError(
                    f"the disk of {hub_cache.folder} is full; what was downloaded is kept. Free "
                    "some space and start again, or put the cache elsewhere with HF_HOME."
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StageError(
                    "the Hugging Face cache can't be written to "
                    f"({error.filename or hub_cache.folder}: {error.strerror}): put it "
                    "elsewhere with HF_HOME."
                ) from error
            raise


def free_space(folder: Path) -> int:
    """Return the free bytes of the file system that ``folder`` is or will be on."""
    for place in (folder, *folder.parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return shutil.disk_usage("/").free


def _download_one(
    number: int, one: _Missing, hub_cache: HubCache, watcher: DownloadListener
) -> None:
    repository, etag = one.remote.request.repository, one.file.etag
    lock = hub_cache.lock(repository, etag)
    with _locked(lock, on_wait=lambda: watcher.bytes(number, one.downloaded)):
        # Another process may have downloaded it meanwhile.
        if not _has_blob(one, hub_cache, watcher):
            sha256 = _download_verified(number, one, watcher)
            with one.partial.open("rb+") as handle:
                os.fsync(handle.fileno())
            one.partial.replace(one.blob)
            hub_cache.remember(one.blob, sha256)
    hub_cache.link(repository, one.remote.commit, one.file.name, etag)
    watcher.brought(number)


def _download_verified(number: int, one: _Missing, watcher: DownloadListener) -> str:
    """Download and verify a file, at most twice; return its SHA-256."""
    name, size = one.file.name, one.file.size
    for last in (False, True):
        download(one.remote, one.file, one.partial, lambda done: watcher.bytes(number, done))
        sha256, right = read_sha256(
            one.partial, one.file.etag, lambda done: watcher.checking(name, done, size)
        )
        if right:
            return sha256
        one.partial.unlink()
        if not last:
            watcher.line(f"{name} arrived damaged and is fetched again.")
    raise StageError(
        f"{one.description} was downloaded twice, and neither copy matches the hub's hash "
        f"({one.file.etag[:12]}): nothing of it is kept. Try again later, or another mirror "
        "(HF_ENDPOINT)."
    )


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock that every client of the hub holds while it writes a blob.

    The operating system releases it when the process dies.
    """
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            # The timeout is for acquiring the lock only.
            lock = WeakFileLock(path, timeout=0.5)
            lock.__enter__()
        except Timeout:
            on_wait()
            continue
        break
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _point_branch(request: Request, hub_cache: HubCache, watcher: DownloadListener) -> None:
    commit = hub_cache.commit(request.repository, request.revision)
    if request.branch is None or commit is None:
        return
    before = hub_cache.commit(request.repository, request.branch)
    try:
        hub_cache.point(request.repository, request.branch, commit)
    except OSError as error:
        raise StageError(
            f"{hub_cache.of(request.repository)} can't be written to ({error.strerror}), and its "
            f"{request.branch} must point at {commit} for programs that ask for it offline."
        ) from error
    if before not in (None, commit):
        watcher.line(
            f"{request.branch} of {request.repository} in the cache points at {commit[:12]} now "
            f"(before: {str(before)[:12]})."
        )
