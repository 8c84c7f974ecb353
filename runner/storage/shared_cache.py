"""The shared cache: finished results under ``outputs/cache``, keyed by a digest of their inputs.

An entry is written under a temporary name, synced and renamed, and is read-only from then on.
``<key>.json`` beside it, its note, has its cache inputs, size and SHA-256, to detect damage by.
:mod:`runner.storage.leases` records which process is making or using an entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.core.atomic import sync, whole
from runner.core.file_identity import Identity, identity_of

Namespace = Literal["media", "latents", "text"]
NAMESPACES: tuple[Namespace, ...] = ("media", "latents", "text")

# What can be wrong with an entry that a run needs.
Fault = Literal["missing", "damaged", "unchecked"]

_CHUNK = 1 << 20
# Threads that read entries; more bring nothing on a local disk and little on a network disk.
_READERS = 8
# Longer than it takes to replace an entry's note and then its file.
_REPLACE_SECONDS = 0.1


def json_digest(cache_inputs: Mapping[str, Any]) -> str:
    """Digest a JSON object, whatever the order of its keys."""
    text = json.dumps(cache_inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def cache_key(cache_inputs: Mapping[str, Any]) -> str:
    """Return the key of the latents or text entry with these cache inputs."""
    return json_digest(cache_inputs) + ".safetensors"


def link(target: Path, path: Path) -> None:
    """Make ``path`` a symbolic link to ``target``, or a copy where links can't be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(target)
    except OSError:
        with whole(path) as temporary:
            shutil.copyfile(target, temporary)


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file in hex; other threads can run meanwhile."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


@dataclass(frozen=True)
class Note:
    """Size and SHA-256 from an entry's note; None if an old version wrote the note without them."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class FinishedFile:
    """A finished file that is to be committed as an entry.

    Attributes:
        key: the key of the entry.
        file: the file, which is moved.
        cache_inputs: what the file was made from.
        sha256: the digest of its bytes, if already known.
        replace: whether it replaces an existing entry.
    """

    key: str
    file: Path
    cache_inputs: Mapping[str, Any]
    sha256: str | None = None
    replace: bool = False


class SharedCache:
    """Entries in three namespaces: extracted media, latents and text embeddings.

    Where namespaces mix, an entry is named by its full key, ``namespace/key``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # Digests of the files read so far, and the identity of the file that each is valid for.
        self._digests: dict[Path, tuple[Identity, str]] = {}

    def path(self, namespace: str, key: str) -> Path:
        """Return the path of an entry, whether it exists or not."""
        return Path(self.root, namespace, key[:2], key)

    def path_of(self, full_key: str) -> Path:
        """Return the path of the entry with this full key, whether it exists or not."""
        namespace, _, key = full_key.partition("/")
        return self.path(namespace, key)

    def has(self, namespace: str, key: str) -> bool:
        """Return whether the entry exists."""
        return self.path(namespace, key).is_file()

    def full_keys(self) -> frozenset[str]:
        """Return the full keys of all entries."""
        return frozenset(
            f"{namespace}/{key}" for namespace in NAMESPACES for key in self._keys(namespace)
        )

    def _keys(self, namespace: Namespace) -> Iterator[str]:
        for part in scan(self.root / namespace):
            if part.is_dir():
                for file in scan(Path(part.path)):
                    if not file.name.startswith(".") and not file.name.endswith(".json"):
                        yield file.name

    def commit(
        self,
        namespace: str,
        key: str,
        file: Path,
        cache_inputs: Mapping[str, Any],
        *,
        replace: bool = False,
    ) -> Path:
        """Move one finished file into the cache as :meth:`commit_all` does.

        Returns:
            Its path in the cache.
        """
        self.commit_all(namespace, [FinishedFile(key, file, cache_inputs, replace=replace)])
        return self.path(namespace, key)

    def commit_all(self, namespace: str, finished_files: Iterable[FinishedFile]) -> None:
        """Move finished files into the cache, all synced before the first is renamed.

        Existing entries are kept unless ``replace`` is set. Replacing is atomic: readers see the
        complete old file or the complete new one, also after a power failure.
        """
        wanted: list[tuple[FinishedFile, Path, Path]] = []
        try:
            for finished in finished_files:
                if finished.replace or not self.has(namespace, finished.key):
                    path = self.path(namespace, finished.key)
                    note = _write_note(finished, path)
                    wanted.append((finished, path, note))
                    finished.file.chmod(0o444)
                else:
                    finished.file.unlink()
            for finished, _, note in wanted:
                sync(finished.file)
                sync(note)
            for finished, path, note in wanted:
                # The note comes first: an entry without one was never finished.
                note.replace(note_of(path))
                _move(finished.file, path)
            for folder in {path.parent for _, path, _ in wanted}:
                sync(folder)
        finally:
            for _, _, note in wanted:
                note.unlink(missing_ok=True)

    def faults(
        self,
        full_keys: Collection[str],
        *,
        read: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Fault]:
        """Find the faulty ones of these entries; their sizes are always compared.

        Args:
            full_keys: the entries to check.
            read: also compare the SHA-256; a file is read again only if it was replaced.
            progress: called with the bytes read so far and in all.

        Returns:
            The fault of each faulty entry. ``unchecked`` means that an old version wrote the entry
            without a digest, so that it cannot be verified.
        """
        faults = self._find_faults(full_keys, read, progress or (lambda _done, _total: None))
        damaged = [full_key for full_key, fault in faults.items() if fault == "damaged"]
        if damaged:
            # Another process may be replacing them right now, the note first, then the file.
            time.sleep(_REPLACE_SECONDS)
            for full_key in damaged:
                del faults[full_key]
            faults |= self._find_faults(damaged, read, lambda _done, _total: None)
        return faults

    def _find_faults(
        self, full_keys: Collection[str], read: bool, progress: Callable[[int, int], None]
    ) -> dict[str, Fault]:
        faults: dict[str, Fault] = {}
        to_read: dict[str, int] = {}
        for full_key in full_keys:
            fault, size = self._check_entry(self.path_of(full_key), read=read)
            if fault:
                faults[full_key] = fault
            elif size:
                to_read[full_key] = size
        if to_read:
            self._read_all(to_read, progress)
        for full_key in to_read:
            fault, size = self._check_entry(self.path_of(full_key), read=True)
            if fault or size:
                faults[full_key] = fault or "damaged"
        return faults

    def _check_entry(self, path: Path, *, read: bool) -> tuple[Fault | None, int]:
        """Check one entry without reading the file: its note, its size, and known digests.

        Both files are looked up each time, since other processes may replace them.

        Returns:
            Its fault if one is known, and how many bytes must be read to decide; 0 for none.
        """
        try:
            stat = path.stat()
        except OSError:
            return "missing", 0
        note = read_note(path)
        if note is None:
            return "damaged", 0
        if note.sha256 is None:
            return "unchecked", 0
        if note.size != stat.st_size:
            return "damaged", 0
        if not read:
            return None, 0
        known = self._digests.get(path)
        if known is None or known[0] != identity_of(stat):
            # At least 1, so that an empty file is checked as well.
            return None, stat.st_size or 1
        return ("damaged" if known[1] != note.sha256 else None), 0

    def _read_all(self, sizes: Mapping[str, int], progress: Callable[[int, int], None]) -> None:
        """Compute the digests of these entries, in several threads."""
        from concurrent.futures import ThreadPoolExecutor, as_completed

        total, done = sum(sizes.values()), 0
        # An affinity mask (Slurm) may allow fewer cores than this computer has.
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
        pool = ThreadPoolExecutor(min(_READERS, max(2, count)), "check")
        try:
            futures = {pool.submit(self._read_one, self.path_of(key)): key for key in sizes}
            for future in as_completed(futures):
                future.result()
                done += sizes[futures[future]]
                progress(done, total)
        finally:
            # On a signal, cancel the reads that have not started.
            pool.shutdown(cancel_futures=True)

    def _read_one(self, path: Path) -> None:
        try:
            before = identity_of(path.stat())
        except OSError:
            return
        try:
            self._digests[path] = (before, digest_of(path))
        except OSError:  # A file that the disk can't read counts as damaged.
            self._digests[path] = (before, "")


def note_of(path: Path) -> Path:
    """Return the path of the note on the entry at ``path``."""
    return path.with_name(path.name + ".json")


def _write_note(finished: FinishedFile, path: Path) -> Path:
    """Write an entry's note under a temporary name, next to the final path of the entry.

    Not in the engine's output folder: an engine that is still running deletes unknown files there.
    """
    note = {
        "bytes": finished.file.stat().st_size,
        "made_of": finished.cache_inputs,
        "sha256": finished.sha256 or digest_of(finished.file),
    }
    text = json.dumps(note, sort_keys=True, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{note_of(path).name}.{os.getpid()}.tmp")
    hidden.write_text(text, encoding="utf-8")
    return hidden


def _move(file: Path, path: Path) -> None:
    """Rename a synced file, or copy it atomically from another file system."""
    try:
        file.replace(path)
    except OSError:
        with whole(path) as temporary:
            shutil.copyfile(file, temporary)
        shutil.copymode(file, path)
        file.unlink()


def read_note(path: Path) -> Note | None:
    """Read the note on the entry at ``path``; None if it is missing or not readable."""
    try:
        note = json.loads(note_of(path).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(note, dict):
        return None
    return Note(note.get("bytes"), note.get("sha256"))


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """List the files and folders in a folder, sorted by name; nothing when it is missing."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
