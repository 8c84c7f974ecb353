"""Who makes which entries of the cache at the moment, and who uses which.

A process that makes entries puts a claim on them, and a run keeps a record of those it uses. Each
is a small JSON file with a lock file beside it, which its process holds: the system lets go of that
when the process dies, however it dies, and the claim is then void.

One file a process, and not one an entry: thousands of open lock files pass the limit on open files,
and locks shared by several entries would make runs on different datasets wait for each other. The
files are read and written under one more lock, the guard, which is held for milliseconds and never
while waiting for a claim. Nobody waits for an entry while holding a claim on one, so that no two
processes can wait for each other; a turn to unpack, which is waited for in between, is named by the
very entries that are claimed, or taken before any is.
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

# How often a waiting process looks whether a claim is gone.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Lease:
    """A claim or a use: what it says, and whether its process lives."""

    id: str
    data: dict[str, Any]
    alive: bool

    @property
    def names(self) -> frozenset[str]:
        """What it names: ``shelf/name`` of entries, or the folder of a bulk writer."""
        names = self.data.get("names")
        return frozenset(map(str, names)) if isinstance(names, list) else frozenset()

    @property
    def who(self) -> str:
        """The run, and its process."""
        host = self.data.get("host")
        where = "" if host == socket.gethostname() else f" on {host}"
        return f"{self.data.get('run')} (process {self.data.get('pid')}{where})"


class LeaseFolder:
    """A folder of records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, id_: str) -> Path:
        return self.folder / f"{id_}.json"

    def _lock(self, id_: str) -> Path:
        return self.folder / f"{id_}.lock"

    def open(self, id_: str, data: dict[str, Any]) -> BaseFileLock:
        """Write a record that lives as long as the lock that is returned is held."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock(id_))
        # Someone who looks whether it is held holds it for a moment.
        lock.acquire(poll_interval=0.01)
        self.write(id_, data)
        return lock

    def write(self, id_: str, data: dict[str, Any]) -> None:
        """Write a record's words, whole or not at all."""
        write_text(self._file(id_), json.dumps(data, ensure_ascii=False))

    def close(self, id_: str, lock: BaseFileLock, *, keep: bool) -> None:
        """Let a record go; with ``keep`` its words stay, of a process that has ended."""
        if not keep:
            self._file(id_).unlink(missing_ok=True)
        lock.release()
        self._lock(id_).unlink(missing_ok=True)

    def alive(self, id_: str) -> bool:
        """Whether a process holds the record."""
        from filelock import FileLock, Timeout

        place = self._lock(id_)
        if not place.exists():
            return False
        try:
            with FileLock(place).acquire(timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            # Another user's, which can't be looked at: rather wait than make things twice.
            return place.exists()

    def all(self) -> list[Lease]:
        """Every record that can be read."""
        found: list[Lease] = []
        for file in scan(self.folder):
            id_, dot, ending = file.name.rpartition(".")
            if dot and ending == "json" and id_ and not id_.startswith("."):
                try:
                    data = json.loads(Path(file.path).read_bytes())
                except (OSError, ValueError):
                    data = {}
                found.append(Lease(id_, data if isinstance(data, dict) else {}, self.alive(id_)))
        return found

    def remove(self, id_: str) -> None:
        """Remove a record whose process has ended."""
        self._file(id_).unlink(missing_ok=True)
        self._lock(id_).unlink(missing_ok=True)

    def remove_dead(self, *, keep: bool) -> list[Lease]:
        """Every record of a living process; of the others the locks go, and unless ``keep`` all.

        To be called under the guard, since a record that is just being opened looks like a scrap.
        """
        records = self.all()
        living = {record.id for record in records if record.alive}
        for record in records:
            if not record.alive and not keep:
                self._file(record.id).unlink(missing_ok=True)
        for file in scan(self.folder):
            id_, _, ending = file.name.rpartition(".")
            # Words are written under the guard, so that what is half-written now will stay so.
            if (ending == "lock" and id_ not in living) or ending == "tmp":
                with suppress(OSError):
                    Path(file.path).unlink()
        return [record for record in records if record.alive]


class Leases:
    """The claims and uses of one cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.claims = LeaseFolder(root / "claims")
        self.uses = LeaseFolder(root / "uses")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold what must be held to change claims and uses, or to delete entries."""
        from filelock import FileLock

        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "cache.lock").acquire(poll_interval=0.01):
            yield

    @contextmanager
    def claim(
        self, names: Collection[str], run: str
    ) -> Iterator[tuple[frozenset[str], tuple[Lease, ...]]]:
        """Claim those of ``names`` that nobody else makes, for as long as the block lasts.

        Gives them, and the claims of others on the rest.
        """
        lock: BaseFileLock | None = None
        id_ = f"{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with self.locked():
                others = [
                    one for one in self.claims.remove_dead(keep=False) if one.names & set(names)
                ]
                free = frozenset(names).difference(*(one.names for one in others))
                if free:
                    lock = self.claims.open(id_, _words(run, free))
            yield free, tuple(others)
        finally:
            if lock is not None:
                self.claims.close(id_, lock, keep=False)

    @contextmanager
    def turn(self, name: str, run: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Claim ``name`` for as long as the block lasts, after everyone who has claimed it.

        ``waiting`` is called once when somebody has.
        """
        reported = False
        while True:
            with self.claim({name}, run) as (mine, others):
                if mine:
                    yield
                    return
            if not reported:
                waiting()
                reported = True
            self.wait(others)

    def wait(self, claims: Sequence[Lease]) -> None:
        """Wait until one of these claims is gone or its process has died."""
        while all(self.claims.alive(claim.id) for claim in claims):
            time.sleep(_POLL_SECONDS)

    def claimed(self) -> frozenset[str]:
        """The names that living processes claim; to be called under the guard."""
        return frozenset().union(*(record.names for record in self.claims.remove_dead(keep=False)))

    def leased_keys(self) -> frozenset[str]:
        """``shelf/name`` of what living processes make or use; to be called under the guard."""
        living = [one for kept in (self.claims, self.uses) for one in kept.all() if one.alive]
        return frozenset().union(*(record.names for record in living))


class UseLease:
    """One run's record of the entries that it counts on.

    ``python -m runner.cache`` deletes none of them while the run's process lives, and knows by the
    record which dataset they belong to when it has ended.
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
        """Count on these entries, instead of those named before."""
        wanted = self.always.union(names)
        if self._lock is not None and wanted == self.names:
            return
        self.names = wanted
        with self.leases.locked():
            if self._lock is None:
                self._lock = self.leases.uses.open(self._id, self._words())
            else:
                self.leases.uses.write(self._id, self._words())

    def release(self) -> None:
        """The run has ended: its record stays, as the only one of its like."""
        if self._lock is None:
            return
        words, uses = self._words(), self.leases.uses
        # A full disk must not make a failure of a run that has ended well.
        with suppress(OSError), self.leases.locked():
            for record in uses.all():
                if not record.alive and record.data.get("set") == words["set"]:
                    uses.remove(record.id)
            uses.write(self._id, words)
            uses.remove_dead(keep=True)
        with suppress(OSError):
            uses.close(self._id, self._lock, keep=True)
        self._lock = None

    def _words(self) -> dict[str, Any]:
        names = sorted(self.names)
        # A sweep's runs use the same, and one record of it is enough.
        alike = json_digest({"names": names, "paths": self.dataset["paths"]})[:16]
        return {**_words(self.run, names), "dataset": self.dataset, "set": alike}


def _words(run: str, names: Collection[str]) -> dict[str, Any]:
    return {
        "run": run,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": time.time(),
        "names": sorted(names),
    }
