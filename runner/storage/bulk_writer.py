"""Write many files into the shared cache: written, synced together, then renamed.

A file under its final name is complete, also after a power failure. Leftovers of a crash are in
``incoming`` and are deleted by the next BulkWriter; files that were already renamed are kept.
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

# Bytes that are synced and renamed at a time: what a crash can lose, and an interrupt waits for.
BATCH_BYTES = 64 << 20

# Folder below the root of the cache; also the prefix of the lease's name.
_FOLDER = "incoming"
_HOLDER = "unpacking"


class CacheNotWritable(UserError):
    """The shared cache can't be written to."""


class BulkWriter(AbstractContextManager["BulkWriter"]):
    """Writes files into one namespace from many threads.

    Only one process at a time can be inside the block of a given name.

    Attributes:
        added: the number of files added so far.
    """

    def __init__(
        self,
        cache: SharedCache,
        namespace: Namespace,
        name: str,
        waiting: Callable[[], None] = lambda: None,
        replace: Collection[str] = (),
    ) -> None:
        """Prepare to write; nothing is touched before the block is entered.

        Args:
            cache: the cache to write to.
            namespace: where the entries go.
            name: what is written, such as the path of an archive; writers of the same name wait for
                each other.
            waiting: called when another process holds the name.
            replace: keys of existing entries to write again, in path of the old ones.
        """
        self.cache, self.namespace, self.waiting, self.replace = cache, namespace, waiting, replace
        self.folder = cache.root / _FOLDER / f"{namespace}-{json_digest({'of': name})[:16]}"
        self._leases = Leases(cache.root)
        self._turn = ExitStack()
        self._reserved: set[str] = set()
        self._finished: list[FinishedFile] = []
        self._bytes = 0
        self.added = 0
        self._mutex = threading.Lock()
        self._numbers = itertools.count()
        self._committer = ThreadPoolExecutor(1)
        self._commits: list[Future[None]] = []

    def __enter__(self) -> BulkWriter:
        turn = self._leases.turn(f"{_FOLDER}/{self.folder.name}", _HOLDER, self.waiting)
        try:
            # Before taking the lease: leftovers may have filled the disk.
            self._clear_leftovers()
            with ExitStack() as stack:
                stack.enter_context(turn)
                # Left by a process that died while this one waited for it.
                shutil.rmtree(self.folder, ignore_errors=True)
                self._turn = stack.pop_all()
        except OSError as error:
            raise self._not_writable(error) from error
        return self

    def _clear_leftovers(self) -> None:
        """Delete what killed processes left behind."""
        dead: list[Path] = []
        with self._leases.locked():
            being_made = self._leases.names_being_made()
            for leftover in scan(self.folder.parent):
                if leftover.is_dir() and f"{_FOLDER}/{leftover.name}" not in being_made:
                    # Renamed, no process takes it; its files are deleted once the lock is released.
                    digest = json_digest({"of": leftover.name})[:16]
                    hidden = Path(leftover.path).with_name(f".{digest}")
                    dead.append(hidden.with_suffix(f".{os.getpid()}.tmp"))
                    Path(leftover.path).rename(dead[-1])
        for folder in dead:
            shutil.rmtree(folder, ignore_errors=True)

    def reserve(self, key: str) -> bool:
        """Reserve a key for the caller, since a source may contain equal media several times.

        Returns:
            Whether the caller is to write the entry: False if it exists or is reserved already.
        """
        with self._mutex:
            exists = key not in self.replace and self.cache.has(self.namespace, key)
            if key in self._reserved or exists:
                return False
            self._reserved.add(key)
            return True

    def write(self, fill: Callable[[Write], object]) -> Path:
        """Write a new file, not yet an entry.

        Args:
            fill: called with a function that appends bytes to the file.

        Returns:
            The file's path.

        Raises:
            CacheNotWritable: the disk can't be written to. What ``fill`` raises is passed on.
        """
        path = self.folder / str(next(self._numbers))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            out = _open(path)
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
            path.unlink(missing_ok=True)
            raise
        return path

    def add(self, file: Path, key: str, cache_inputs: Mapping[str, Any], sha256: str) -> None:
        """Commit a file that :meth:`write` made, with this digest, as the entry ``key``."""
        try:
            size = file.stat().st_size
        except OSError as error:
            raise self._not_writable(error) from error
        with self._mutex:
            replace = key in self.replace
            self._finished.append(FinishedFile(key, file, cache_inputs, sha256, replace))
            self._bytes += size
            self.added += 1
            if self._bytes >= BATCH_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        batch, self._finished, self._bytes = self._finished, [], 0
        self._commits.append(self._committer.submit(self.cache.commit_all, self.namespace, batch))

    def _not_writable(self, error: OSError) -> CacheNotWritable:
        reason = error.strerror or str(error)
        return CacheNotWritable(
            f"{self.cache.root} can't be written to ({reason}): free some space, or name another "
            "folder with output_dir."
        )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._mutex:
            if self._finished:
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


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, path.open("wb", buffering=0))


def _close(out: BinaryIO, not_writable: Callable[[OSError], CacheNotWritable]) -> None:
    try:
        out.close()
    except OSError as error:  # A full network file system reports the error on close.
        raise not_writable(error) from error


def _begin_writeback(descriptor: int) -> None:
    """Ask the system to start writing the file to disk, so that syncing it later is quick."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        with suppress(OSError):
            advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
