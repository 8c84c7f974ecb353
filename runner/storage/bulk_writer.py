"""Many files into the store at once: written, synced together, then renamed.

A file under its final name is whole, after a power cut too. What a cut leaves behind lies in
`incoming` and is cleared by the next run that takes something in; what was renamed before it stays.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from runner.core.errors import UserError
from runner.storage.leases import Leases
from runner.storage.shared_cache import FinishedFile, Namespace, SharedCache, json_digest, scan

Write = Callable[[bytes | memoryview], None]

# So much is synced and renamed at a time: what a crash can cost, and what an interrupt waits for.
BATCH_BYTES = 64 << 20

# Below the cache's root; what is claimed is called by it too.
_FOLDER = "incoming"
_WHO = "unpacking"


class CacheNotWritable(UserError):
    """The store can't be written to."""


class BulkWriter(AbstractContextManager["BulkWriter"]):
    """Takes files into one shelf from many threads; one process at a time has a block of a name.

    name: of what is taken in, so that those who take in the same wait for each other, and no others
    do. waiting: called when another process has it. anew: entries to make though they are there.
    added: how many it took.
    """

    def __init__(
        self,
        store: SharedCache,
        namespace: Namespace,
        name: str,
        waiting: Callable[[], None] = lambda: None,
        anew: Collection[str] = (),
    ) -> None:
        self.store, self.namespace, self.waiting, self.anew = store, namespace, waiting, anew
        self.folder = store.root / _FOLDER / f"{namespace}-{json_digest({'of': name})[:16]}"
        self._leases = Leases(store.root)
        self._turn = ExitStack()
        self._claimed: set[str] = set()
        self._arrivals: list[FinishedFile] = []
        self._bytes = 0
        self.added = 0
        self._mutex = threading.Lock()
        self._numbers = itertools.count()
        self._committer = ThreadPoolExecutor(1)
        self._commits: list[Future[None]] = []

    def __enter__(self) -> BulkWriter:
        turn = self._leases.turn(f"{_FOLDER}/{self.folder.name}", _WHO, self.waiting)
        try:
            # Before the claim, which a disk that they have filled might not take.
            self._clear_leftovers()
            with ExitStack() as stack:
                stack.enter_context(turn)
                # Of a process that was waited for and died.
                shutil.rmtree(self.folder, ignore_errors=True)
                self._turn = stack.pop_all()
        except OSError as error:
            raise self._not_writable(error) from error
        return self

    def _clear_leftovers(self) -> None:
        """Remove what processes left behind that were killed."""
        dead: list[Path] = []
        with self._leases.locked():
            living = self._leases.claimed()
            for found in scan(self.folder.parent):
                if found.is_dir() and f"{_FOLDER}/{found.name}" not in living:
                    # Nobody's from here on; gigabytes are deleted when others need not wait for it.
                    hidden = Path(found.path).with_name(f".{json_digest({'of': found.name})[:16]}")
                    dead.append(hidden.with_suffix(f".{os.getpid()}.tmp"))
                    Path(found.path).rename(dead[-1])
        for folder in dead:
            shutil.rmtree(folder, ignore_errors=True)

    def claim(self, name: str) -> bool:
        """Whether the entry is to be made, by who asks: it is not there and no one else makes it.

        Equal media may lie in a source several times.
        """
        with self._mutex:
            there = name not in self.anew and self.store.has(self.namespace, name)
            if name in self._claimed or there:
                return False
            self._claimed.add(name)
            return True

    def write(self, fill: Callable[[Write], object]) -> Path:
        """A new file of what `fill` gives to the function it is called with.

        Raises CannotKeep where the disk that is written to fails, and what `fill` raises.
        """
        place = self.folder / str(next(self._numbers))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            out = _open(place)
        except OSError as error:
            raise self._not_writable(error) from error

        def write(data: bytes | memoryview) -> None:
            view = memoryview(data)
            try:
                while view:
                    view = view[out.write(view) :]
            except OSError as error:
                raise self._not_writable(error) from error

        try:
            try:
                fill(write)
                _begin_writeback(out.fileno())
            finally:
                _close(out, self._not_writable)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        return place

    def add(self, file: Path, name: str, cache_inputs: Mapping[str, Any], sha256: str) -> None:
        """Take a file that `write` made, of this digest, as the entry `name`."""
        try:
            size = file.stat().st_size
        except OSError as error:
            raise self._not_writable(error) from error
        with self._mutex:
            replace = name in self.anew
            self._arrivals.append(FinishedFile(name, file, cache_inputs, sha256, replace))
            self._bytes += size
            self.added += 1
            if self._bytes >= BATCH_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        batch, self._arrivals, self._bytes = self._arrivals, [], 0
        self._commits.append(self._committer.submit(self.store.commit_all, self.namespace, batch))

    def _not_writable(self, error: OSError) -> CacheNotWritable:
        words = error.strerror or str(error)
        return CacheNotWritable(
            f"{self.store.root} can't be written to ({words}): free some space, or name another "
            "folder with output_dir."
        )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._mutex:
            if self._arrivals:
                self._hand_over()
        self._committer.shutdown()
        try:
            for commit in self._commits:
                commit.result()
        except OSError as failure:
            if error is None:
                raise self._not_writable(failure) from failure
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._turn.close()


def _open(place: Path) -> BinaryIO:
    return cast(BinaryIO, place.open("wb", buffering=0))


def _close(out: BinaryIO, not_writable: Callable[[OSError], CacheNotWritable]) -> None:
    try:
        out.close()
    except OSError as error:  # Where a file system over a network is full, it says so here.
        raise not_writable(error) from error


def _begin_writeback(descriptor: int) -> None:
    """Have the system write the file out from now on, so that syncing it later is quick."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        with suppress(OSError):
            advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
