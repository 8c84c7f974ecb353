"""Have files of the hub on this machine: look, ask, check what can be known, bring, check."""

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
    """A file that is here, whole, and which it is."""

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
    """A file to bring: where its bytes will lie, and where they grow until they are whole.

    Older versions of huggingface_hub resume from this name as well.
    """

    remote: Remote
    file: RemoteFile
    blob: Path

    @property
    def partial(self) -> Path:
        return self.blob.with_name(self.blob.name + ".incomplete")

    @property
    def what(self) -> str:
        return f"{self.file.name} of {self.remote.request.repository}"

    @property
    def have(self) -> int:
        """The bytes of it that are here."""
        return min(self.file.size, _size(self.partial))


def fetch_files(
    requests: Sequence[Request], cache: HubCache, watcher: DownloadListener, *, force: bool = False
) -> list[FetchedFile]:
    """Have every file of ``requests`` in the cache, each read once and found whole.

    Where all of a request is here the hub is not asked, whatever its branch points at by now;
    with ``force`` it is asked, and every file is read again. Raises :class:`StageError`, in one
    line, before the first byte where what is wrong can be known then: no such repository, file or
    revision, no access, no network, no space.
    """
    for request in requests:
        _verify_present_files(request, cache, watcher, again=force)
    missing_files = [request for request in requests if cache.missing_files(request)]
    if not offline():
        _fetch([look_up(one) for one in (requests if force else missing_files)], cache, watcher)
    elif missing_files:
        raise StageError(_missing_offline_message(missing_files, cache))
    for request in requests:
        _point_branch(request, cache, watcher)
        # Where there are no links, a file has a new place by now.
        _verify_present_files(request, cache, watcher, again=False)
    found = recorded(requests, cache)
    if found is None or any(map(cache.missing_files, requests)):
        raise StageError("files of the hub were changed while they were fetched: start again.")
    return found


def recorded(requests: Sequence[Request], cache: HubCache) -> list[FetchedFile] | None:
    """The files of ``requests`` that are here; None unless each was read and found whole."""
    found = []
    for request in requests:
        repository, revision = request.repository, request.revision
        commit = cache.commit(repository, revision) or ""
        for name, one in cache.here(request).items():
            sha256, size = cache.known_sha256(one), _size(one.blob)
            if sha256 is None:
                return None
            found.append(
                FetchedFile(
                    repository, revision, commit, name, size, sha256, request.option, one.path
                )
            )
    return found


def _fetch(remotes: Sequence[Remote], cache: HubCache, watcher: DownloadListener) -> None:
    """Bring what is missing of ``remotes``, and let their revisions point at it."""
    todo = []
    for remote in remotes:
        missing = _missing(remote, cache, watcher)
        if missing:
            check_access(remote, missing[0].file)
        todo += missing
    _bring(todo, cache, watcher)
    for remote in remotes:
        repository = remote.request.repository
        for file in remote.files:
            if cache.find(repository, remote.commit, file.name) is None:
                cache.link(repository, remote.commit, file.name, file.etag)
        cache.point(repository, remote.request.revision, remote.commit)


def _verify_present_files(
    request: Request, cache: HubCache, watcher: DownloadListener, *, again: bool
) -> None:
    for name, cached in cache.here(request).items():
        _is_whole(cached, f"{name} of {request.repository}", cache, watcher, again=again)


def _is_whole(
    cached: HubFile, what: str, cache: HubCache, watcher: DownloadListener, *, again: bool = False
) -> bool:
    """Read a file that is here, if it never was, and throw it away when it is damaged."""
    if not again and cache.known_sha256(cached):
        return True
    size = _size(cached.blob)
    sha256, right = read_sha256(
        cached.blob, cached.etag, lambda done: watcher.checking(what, done, size)
    )
    if right:
        cache.remember(cached.blob, sha256)
        return True
    damaged = f"{what} is damaged: the bytes of {cached.blob} are not those its name stands for"
    if offline():
        raise StageError(f"{damaged}. Run once without HF_HUB_OFFLINE to fetch it again.")
    watcher.line(f"{damaged}. It is thrown away and fetched again.")
    cached.blob.unlink()
    return False


def _missing_offline_message(requests: Sequence[Request], cache: HubCache) -> str:
    parts = "; ".join(
        f"{', '.join(cache.missing_files(request))} of {request.repository} ({request.revision})"
        for request in requests
    )
    return (
        f"HF_HUB_OFFLINE is set and the Hugging Face cache ({cache.folder}) lacks {parts}. "
        "Run once without it, or copy a cache that has them."
    )


def _missing(remote: Remote, cache: HubCache, watcher: DownloadListener) -> list[_Missing]:
    repository = remote.request.repository
    files = [
        _Missing(remote, file, cache.blob(repository, file.etag))
        for file in remote.files
        if cache.find(repository, remote.commit, file.name) is None
    ]
    # The same bytes can be here for another revision.
    return [one for one in files if not _has_blob(one, cache, watcher)]


def _has_blob(one: _Missing, cache: HubCache, watcher: DownloadListener) -> bool:
    cached = HubFile(one.blob, one.blob, one.file.etag)
    return one.blob.is_file() and _is_whole(cached, one.what, cache, watcher)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _bring(todo: Sequence[_Missing], cache: HubCache, watcher: DownloadListener) -> None:
    if not todo:
        return
    missing_files = sum(one.file.size - one.have for one in todo)
    free = free_space(cache.folder)
    if missing_files > free:
        raise StageError(
            f"{counted(len(todo), 'file')} ({readable(missing_files)}) must be fetched, and only "
            f"{readable(free)} are free at {cache.folder}: free some, or put the cache elsewhere "
            "with HF_HOME."
        )
    watcher.begin([(one.file.name, one.file.size, one.have) for one in todo])
    for number, one in enumerate(todo):
        try:
            _bring_one(number, one, cache, watcher)
        except OSError as error:
            if error.errno in _FULL:
                raise StageError(
                    f"the disk of {cache.folder} is full; what was downloaded is kept. Free some "
                    "space and start again, or put the cache elsewhere with HF_HOME."
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StageError(
                    f"the Hugging Face cache can't be written to ({error.filename or cache.folder}"
                    f": {error.strerror}): put it elsewhere with HF_HOME."
                ) from error
            raise


def free_space(folder: Path) -> int:
    """Free bytes of the file system that ``folder`` is or will be on."""
    for place in (folder, *folder.parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return shutil.disk_usage("/").free


def _bring_one(number: int, one: _Missing, cache: HubCache, watcher: DownloadListener) -> None:
    repository, etag = one.remote.request.repository, one.file.etag
    lock = cache.lock(repository, etag)
    with _locked(lock, on_wait=lambda: watcher.bytes(number, one.have)):
        # Another run, or another program, may have made it while this one waited.
        if not _has_blob(one, cache, watcher):
            sha256 = _whole(number, one, watcher)
            with one.partial.open("rb+") as handle:
                os.fsync(handle.fileno())
            one.partial.replace(one.blob)
            cache.remember(one.blob, sha256)
    cache.link(repository, one.remote.commit, one.file.name, etag)
    watcher.brought(number)


def _whole(number: int, one: _Missing, watcher: DownloadListener) -> str:
    """Download until the bytes are right, twice at most; returns their sha256."""
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
        f"{one.what} arrived twice with other bytes than the hub names ({one.file.etag[:12]}): "
        "nothing of it is kept. Try again later, or another mirror (HF_ENDPOINT)."
    )


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock that clients of the hub hold while they make a blob.

    The system lets go of it when its process dies.
    """
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            # A timeout on entering; what happens inside is not timed.
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


def _point_branch(request: Request, cache: HubCache, watcher: DownloadListener) -> None:
    commit = cache.commit(request.repository, request.revision)
    if request.branch is None or commit is None:
        return
    before = cache.commit(request.repository, request.branch)
    try:
        cache.point(request.repository, request.branch, commit)
    except OSError as error:
        raise StageError(
            f"{cache.of(request.repository)} can't be written to ({error.strerror}), and its "
            f"{request.branch} must point at {commit} for programs that ask for it offline."
        ) from error
    if before not in (None, commit):
        watcher.line(
            f"{request.branch} of {request.repository} in the cache points at {commit[:12]} now "
            f"(before: {str(before)[:12]})."
        )
