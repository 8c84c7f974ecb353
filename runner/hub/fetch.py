"""Have files of the hub on this machine: look, ask, check what can be known, bring, check."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from runner.core.errors import StageError
from runner.core.text import counted, readable
from runner.hub.cache import Cached, HubCache, Request, read_sha256
from runner.hub.progress import Watcher
from runner.hub.remote import Remote, RemoteFile, check_access, download, look_up, offline

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Obtained:
    """A file that is here, whole, and which it is."""

    repository: str
    revision: str
    commit: str
    file: str
    size: int
    sha256: str
    option: str
    path: Path


@dataclass
class _Job:
    """What has to be done for one request."""

    remote: Remote
    missing: list[RemoteFile] = field(default_factory=list)


def obtain(
    requests: Sequence[Request], cache: HubCache, watcher: Watcher, *, force: bool = False
) -> list[Obtained]:
    """Have every file of ``requests`` in the cache, each read once and found whole.

    Where all of a request is here the hub is not asked, whatever its branch points at by now;
    with ``force`` it is asked, and every file is read again. Raises :class:`StageError`, in one
    line, before the first byte where what is wrong can be known then: no such repository, file or
    revision, no access, no network, no space.
    """
    for request in requests:
        _check_here(request, cache, watcher, again=force)
    lacking = [request for request in requests if cache.lacking(request)]
    if offline():
        if lacking:
            raise StageError(_lacking_offline(lacking, cache))
        jobs = []
    else:
        jobs = [
            _job(look_up(request), cache, watcher) for request in (requests if force else lacking)
        ]
    for job in jobs:
        if job.missing:
            check_access(job.remote, job.missing[0])
    _bring(jobs, cache, watcher)
    for job in jobs:
        request, commit = job.remote.request, job.remote.commit
        for file in job.remote.files:
            if cache.find(request.repository, commit, file.name) is None:
                cache.link(request.repository, commit, file.name, file.etag)
        cache.point(request.repository, request.revision, commit)
    for request in requests:
        _point_branch(request, cache, watcher)
        # Where there are no links, a file has a new place by now.
        _check_here(request, cache, watcher, again=False)
    found = recorded(requests, cache)
    if found is None or any(map(cache.lacking, requests)):
        raise StageError("files of the hub were changed while they were fetched: start again.")
    return found


def recorded(requests: Sequence[Request], cache: HubCache) -> list[Obtained] | None:
    """The files of ``requests`` that are here; None unless each was read and found whole."""
    found = []
    for request in requests:
        commit = cache.commit(request.repository, request.revision)
        for name in cache.here(request):
            cached = cache.find(request.repository, commit, name)
            sha256 = cache.known_sha256(cached) if cached else None
            if cached is None or commit is None or sha256 is None:
                return None
            found.append(
                Obtained(
                    request.repository,
                    request.revision,
                    commit,
                    name,
                    _size(cached.blob),
                    sha256,
                    request.option,
                    cached.path,
                )
            )
    return found


def _check_here(request: Request, cache: HubCache, watcher: Watcher, *, again: bool) -> None:
    commit = cache.commit(request.repository, request.revision)
    for name in cache.here(request):
        cached = cache.find(request.repository, commit, name)
        if cached is not None:
            _is_whole(cached, f"{name} of {request.repository}", cache, watcher, again=again)


def _is_whole(
    cached: Cached, what: str, cache: HubCache, watcher: Watcher, *, again: bool = False
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


def _lacking_offline(requests: Sequence[Request], cache: HubCache) -> str:
    parts = "; ".join(
        f"{', '.join(cache.lacking(request))} of {request.repository} ({request.revision})"
        for request in requests
    )
    return (
        f"HF_HUB_OFFLINE is set and the Hugging Face cache ({cache.folder}) lacks {parts}. "
        "Run once without it, or copy a cache that has them."
    )


def _job(remote: Remote, cache: HubCache, watcher: Watcher) -> _Job:
    job = _Job(remote)
    repository = remote.request.repository
    for file in remote.files:
        if cache.find(repository, remote.commit, file.name) is not None:
            continue
        # The same bytes can be here for another revision.
        blob = cache.blob(repository, file.etag)
        what = f"{file.name} of {repository}"
        if not blob.is_file() or not _is_whole(Cached(blob, blob, file.etag), what, cache, watcher):
            job.missing.append(file)
    return job


def _partial(cache: HubCache, repository: str, file: RemoteFile) -> Path:
    """Where a file grows. Older versions of huggingface_hub resume from this name as well."""
    blob = cache.blob(repository, file.etag)
    return blob.with_name(blob.name + ".incomplete")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _bring(jobs: Sequence[_Job], cache: HubCache, watcher: Watcher) -> None:
    todo = [(job.remote, file) for job in jobs for file in job.missing]
    if not todo:
        return
    have = [
        min(file.size, _size(_partial(cache, remote.request.repository, file)))
        for remote, file in todo
    ]
    lacking = sum(file.size - part for (_, file), part in zip(todo, have, strict=True))
    free = free_space(cache.folder)
    if lacking > free:
        raise StageError(
            f"{counted(len(todo), 'file')} ({readable(lacking)}) must be fetched, and only "
            f"{readable(free)} are free at {cache.folder}: free some, or put the cache elsewhere "
            "with HF_HOME."
        )
    watcher.begin(
        [(file.name, file.size, part) for (_, file), part in zip(todo, have, strict=True)]
    )
    for number, (remote, file) in enumerate(todo):
        try:
            _bring_one(number, remote, file, cache, watcher)
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


def _bring_one(
    number: int, remote: Remote, file: RemoteFile, cache: HubCache, watcher: Watcher
) -> None:
    repository = remote.request.repository
    blob, partial = cache.blob(repository, file.etag), _partial(cache, repository, file)

    def waits() -> None:
        watcher.bytes(number, min(file.size, _size(partial)))

    with _locked(cache.lock(repository, file.etag), waits):
        what = f"{file.name} of {repository}"
        # Another run, or another program, may have made it while this one waited.
        if not blob.is_file() or not _is_whole(Cached(blob, blob, file.etag), what, cache, watcher):
            sha256 = _whole(number, remote, file, partial, watcher)
            with partial.open("rb+") as handle:
                os.fsync(handle.fileno())
            partial.replace(blob)
            cache.remember(blob, sha256)
    cache.link(repository, remote.commit, file.name, file.etag)
    watcher.brought(number)


def _whole(number: int, remote: Remote, file: RemoteFile, partial: Path, watcher: Watcher) -> str:
    """Download until the bytes are right, twice at most; returns their sha256."""
    for last in (False, True):
        download(remote, file, partial, lambda done: watcher.bytes(number, done))
        sha256, right = read_sha256(
            partial, file.etag, lambda done: watcher.checking(file.name, done, file.size)
        )
        if right:
            return sha256
        partial.unlink()
        if not last:
            watcher.line(f"{file.name} arrived damaged and is fetched again.")
    raise StageError(
        f"{file.name} of {remote.request.repository} arrived twice with other bytes than the hub "
        f"names ({file.etag[:12]}): nothing of it is kept. Try again later, or another mirror "
        "(HF_ENDPOINT)."
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


def _point_branch(request: Request, cache: HubCache, watcher: Watcher) -> None:
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
