"""Leases: which process is making, and which is using, which entries of the shared cache.

A process that makes entries takes a lease on them (in ``claims/``), and a run holds a lease on
those it uses (in ``uses/``). A lease is a small JSON file and a lock file beside it that the
process keeps locked. The operating system releases the lock when the process ends, however it ends,
and then the lease is no longer held.

There is one file per process, not per entry: thousands of open lock files would exceed the limit on
open files, and locks shared by several entries would make runs on different datasets wait for each
other. The files are read and written while holding one more lock, that of the whole cache, which is
held for milliseconds and never while waiting for a lease.

No process waits for entries that another makes while it holds a lease for making entries itself, so
there is no deadlock. The one lease that a process does wait for, that for unpacking an archive, is
either taken before any entry is leased, or named by exactly the entries already leased.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.atomic import write_text
from runner.storage.shared_cache import json_digest, scan

if TYPE_CHECKING:
    from filelock import BaseFileLock

# Seconds after which a waiting process checks the leases again.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Lease:
    """One lease: its id, its JSON, and whether its process is alive."""

    id: str
    data: dict[str, Any]
    alive: bool

    @property
    def names(self) -> frozenset[str]:
        """The leased names: full keys of entries, or the folder of a bulk writer."""
        names = self.data.get("names")
        return frozenset(map(str, names)) if isinstance(names, list) else frozenset()

    @property
    def holder(self) -> str:
        """The run that holds the lease, and its process."""
        host = self.data.get("host")
        where = "" if host == socket.gethostname() else f" on {host}"
        return f"{self.data.get('run')} (process {self.data.get('pid')}{where})"


class LeaseFolder:
    """A folder of leases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, id_: str) -> Path:
        return self.folder / f"{id_}.json"

    def _lock(self, id_: str) -> Path:
        return self.folder / f"{id_}.lock"

    def open(self, id_: str, data: dict[str, Any]) -> BaseFileLock:
        """Write a lease and lock it.

        Returns:
            The lock; the lease is held until it is released.
        """
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock(id_))
        # :meth:`alive` of another process acquires the lock briefly, so wait for it.
        lock.acquire(poll_interval=0.01)
        self.write(id_, data)
        return lock

    def write(self, id_: str, data: dict[str, Any]) -> None:
        """Write the JSON of a lease, atomically."""
        write_text(self._file(id_), json.dumps(data, ensure_ascii=False))

    def close(self, id_: str, lock: BaseFileLock, *, keep: bool) -> None:
        """Release a lease; with ``keep`` its JSON stays, as the record of a run that has ended."""
        if not keep:
            self._file(id_).unlink(missing_ok=True)
        lock.release()
        self._lock(id_).unlink(missing_ok=True)

    def alive(self, id_: str) -> bool:
        """Return whether a living process holds the lease."""
        from filelock import FileLock, Timeout

        path = self._lock(id_)
        if not path.exists():
            return False
        try:
            with FileLock(path).acquire(timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            # Another user's lock file: assume that it is held, so that nothing is made twice.
            return path.exists()

    def all(self) -> list[Lease]:
        """Read every lease in the folder."""
        leases: list[Lease] = []
        for file in scan(self.folder):
            id_, dot, ending = file.name.rpartition(".")
            if dot and ending == "json" and id_ and not id_.startswith("."):
                try:
                    data = json.loads(Path(file.path).read_bytes())
                except (OSError, ValueError):
                    data = {}
                leases.append(Lease(id_, data if isinstance(data, dict) else {}, self.alive(id_)))
        return leases

    def remove(self, id_: str) -> None:
        """Remove a lease whose process has ended."""
        self._file(id_).unlink(missing_ok=True)
        self._lock(id_).unlink(missing_ok=True)

    def remove_dead(self, *, keep: bool) -> list[Lease]:
        """Remove the lock files of dead processes, and their JSON too unless ``keep`` is set.

        Call this with the cache locked: a lease that is just being opened looks like a leftover.

        Returns:
            The leases of living processes.
        """
        leases = self.all()
        living = {lease.id for lease in leases if lease.alive}
        for lease in leases:
            if not lease.alive and not keep:
                self._file(lease.id).unlink(missing_ok=True)
        for file in scan(self.folder):
            id_, _, ending = file.name.rpartition(".")
            # JSON is written with the cache locked, so a temporary file found here is a leftover.
            if (ending == "lock" and id_ not in living) or ending == "tmp":
                with suppress(OSError):
                    Path(file.path).unlink()
        return [lease for lease in leases if lease.alive]


class Leases:
    """All leases on one cache: ``making`` has those for making entries, ``using`` those for use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.making = LeaseFolder(root / "claims")
        self.using = LeaseFolder(root / "uses")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the whole cache, needed to change leases or to delete entries."""
        from filelock import FileLock

        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "cache.lock").acquire(poll_interval=0.01):
            yield

    @contextmanager
    def lease_for_making(
        self, names: Collection[str], run: str
    ) -> Iterator[tuple[frozenset[str], tuple[Lease, ...]]]:
        """Lease those of ``names`` that no other process is making, for the duration of the block.

        Args:
            names: the full keys to lease.
            run: the holder, for messages of other processes.

        Yields:
            The leased names, and the leases of other processes on the rest.
        """
        lock: BaseFileLock | None = None
        id_ = f"{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with self.locked():
                others = [
                    lease
                    for lease in self.making.remove_dead(keep=False)
                    if lease.names & set(names)
                ]
                free = frozenset(names).difference(*(lease.names for lease in others))
                if free:
                    lock = self.making.open(id_, _content(run, free))
            yield free, tuple(others)
        finally:
            if lock is not None:
                self.making.close(id_, lock, keep=False)

    @contextmanager
    def turn(self, name: str, run: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Wait until nobody has a lease on ``name``, then lease it for the duration of the block.

        Args:
            name: what to lease.
            run: the holder, for messages of other processes.
            waiting: called once if another process holds the lease.
        """
        reported = False
        while True:
            with self.lease_for_making({name}, run) as (leased, others):
                if leased:
                    yield
                    return
            if not reported:
                waiting()
                reported = True
            self.wait(others)

    def wait(self, leases: Sequence[Lease]) -> None:
        """Wait until one of these leases is released or its process has died."""
        while all(self.making.alive(lease.id) for lease in leases):
            time.sleep(_POLL_SECONDS)

    def names_being_made(self) -> frozenset[str]:
        """Return the names that living processes are making. Call with the cache locked."""
        return frozenset().union(*(lease.names for lease in self.making.remove_dead(keep=False)))

    def leased_keys(self) -> frozenset[str]:
        """Return the full keys that living processes make or use. Call with the cache locked."""
        leases = [*self.making.all(), *self.using.all()]
        return frozenset().union(*(lease.names for lease in leases if lease.alive))


class UseLease:
    """A run's lease on the entries that it uses.

    ``python -m runner.cache`` deletes none of them while the run's process is alive. The JSON stays
    when the run has ended, and says which dataset the entries belong to. The names in ``always``
    are leased as long as anything is.
    """

    def __init__(
        self, leases: Leases, run: str, dataset: dict[str, Any], always: Collection[str] = ()
    ) -> None:
        self.leases, self.run, self.dataset = leases, run, dataset
        self.always = frozenset(always)
        self.names: frozenset[str] = frozenset()
        self._id = json_digest({"run": run, "host": socket.gethostname(), "pid": os.getpid()})[:16]
        self._lock: BaseFileLock | None = None

    def hold(self, names: Collection[str]) -> None:
        """Lease these entries, instead of those leased before."""
        wanted = self.always.union(names)
        if self._lock is not None and wanted == self.names:
            return
        self.names = wanted
        with self.leases.locked():
            if self._lock is None:
                self._lock = self.leases.using.open(self._id, self._content())
            else:
                self.leases.using.write(self._id, self._content())

    def release(self) -> None:
        """Release the lease at the end of the run.

        Its JSON stays; those of earlier runs with the same entries and sources are deleted.
        """
        if self._lock is None:
            return
        content, using = self._content(), self.leases.using
        # A full disk must not turn a successful run into a failure.
        with suppress(OSError), self.leases.locked():
            for lease in using.all():
                if not lease.alive and lease.data.get("set") == content["set"]:
                    using.remove(lease.id)
            using.write(self._id, content)
            using.remove_dead(keep=True)
        with suppress(OSError):
            using.close(self._id, self._lock, keep=True)
        self._lock = None

    def _content(self) -> dict[str, Any]:
        names = sorted(self.names)
        # The runs of a sweep use the same entries; one JSON for all of them is enough.
        set_id = json_digest({"names": names, "paths": self.dataset["paths"]})[:16]
        return {**_content(self.run, names), "dataset": self.dataset, "set": set_id}


def _content(run: str, names: Collection[str]) -> dict[str, Any]:
    return {
        "run": run,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": time.time(),
        "names": sorted(names),
    }
