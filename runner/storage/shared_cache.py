"""The shared cache: finished work under ``outputs/cache``, named by what went into it.

An entry is written under a temporary name, synced and renamed, and is read-only from then on. Its
note, ``<name>.json`` beside it, says what made it, and its size and digest, by which damage is
found. Who makes and who uses entries at the moment is told by :mod:`runner.storage.leases`.
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

# What can be wrong with an entry that is counted on.
Fault = Literal["absent", "damaged", "unchecked"]

_CHUNK = 1 << 20
# More readers than this gain nothing on a local disk, and some on a shared one.
_READERS = 8
# Between an entry's note and its file, when both are replaced, far less than this goes by.
_REPLACE_SECONDS = 0.1


def json_digest(cache_inputs: Mapping[str, Any]) -> str:
    """The name of an entry: a digest of everything it is made of."""
    text = json.dumps(cache_inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def cache_key(cache_inputs: Mapping[str, Any]) -> str:
    """The name in the store of a cache entry made of this."""
    return json_digest(cache_inputs) + ".safetensors"


def link(target: Path, place: Path) -> None:
    """Put ``target`` at ``place``: a symbolic link, or a copy where links can't be made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(target)
    except OSError:
        with whole(place) as temporary:
            shutil.copyfile(target, temporary)


def digest_of(file: Path) -> str:
    """The sha256 of a file's bytes, hex. Other threads go on meanwhile."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


@dataclass(frozen=True)
class EntryInfo:
    """What an entry's note says of its bytes; None where it was written before that was noted."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class FinishedFile:
    """A finished file that is to become the entry ``name``.

    sha256: of its bytes, where that is known already. replace: whether it takes the place of an
    entry that is there.
    """

    name: str
    file: Path
    cache_inputs: Mapping[str, Any]
    sha256: str | None = None
    replace: bool = False


class SharedCache:
    """Entries on three shelves: extracted media, latents and text embeddings.

    ``shelf/name`` is what an entry is called where shelves mix.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # The digest of each file that was read, by what tells that the file is still the same.
        self._read: dict[Path, tuple[Identity, str]] = {}

    def path(self, namespace: str, name: str) -> Path:
        """Where an entry lies, or will lie."""
        return Path(self.root, namespace, name[:2], name)

    def place(self, full_key: str) -> Path:
        """Where the entry called ``shelf/name`` lies, or will lie."""
        namespace, _, name = full_key.partition("/")
        return self.path(namespace, name)

    def has(self, namespace: str, name: str) -> bool:
        return self.path(namespace, name).is_file()

    def names(self) -> frozenset[str]:
        """``shelf/name`` of every entry."""
        return frozenset(
            f"{namespace}/{name}" for namespace in NAMESPACES for name in self._files(namespace)
        )

    def _files(self, namespace: Namespace) -> Iterator[str]:
        for part in scan(self.root / namespace):
            if part.is_dir():
                for file in scan(Path(part.path)):
                    if not file.name.startswith(".") and not file.name.endswith(".json"):
                        yield file.name

    def commit(
        self,
        namespace: str,
        name: str,
        file: Path,
        cache_inputs: Mapping[str, Any],
        *,
        replace: bool = False,
    ) -> Path:
        """Move one finished ``file`` into the store as :meth:`commit_all` does; its place there."""
        self.commit_all(namespace, [FinishedFile(name, file, cache_inputs, replace=replace)])
        return self.path(namespace, name)

    def commit_all(self, namespace: str, arrivals: Iterable[FinishedFile]) -> None:
        """Move finished files into the store, synced together before the first is renamed.

        An entry that is there already stays, unless it is to be replaced: whoever reads it then
        has the old file or the new one, whole, at any moment. So it is after a power cut.
        """
        wanted: list[tuple[FinishedFile, Path, Path]] = []
        try:
            for one in arrivals:
                if one.replace or not self.has(namespace, one.name):
                    place = self.path(namespace, one.name)
                    note = _write_note(one, place)
                    wanted.append((one, place, note))
                    one.file.chmod(0o444)
                else:
                    one.file.unlink()
            for one, _, note in wanted:
                sync(one.file)
                sync(note)
            for one, place, note in wanted:
                # The note comes first: an entry without its note was never finished.
                note.replace(note_of(place))
                _move(one.file, place)
            for folder in {place.parent for _, place, _ in wanted}:
                sync(folder)
        finally:
            for _, _, note in wanted:
                note.unlink(missing_ok=True)

    def faults(
        self,
        full_key: Collection[str],
        *,
        read: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Fault]:
        """Which of these entries can't be counted on, and why; their sizes are compared always.

        With ``read`` their bytes are too, those of each file once in the life of this object.
        ``unchecked`` are entries whose note has no digest: they were made by a version that
        noted none, and nothing can vouch for them. ``progress`` gets the bytes read and to read.
        """
        found = self._find_faults(full_key, read, progress or (lambda _done, _total: None))
        damaged = [one for one, fault in found.items() if fault == "damaged"]
        if damaged:
            # Another process may be at replacing them, note first and then file.
            time.sleep(_REPLACE_SECONDS)
            for one in damaged:
                del found[one]
            found |= self._find_faults(damaged, read, lambda _done, _total: None)
        return found

    def _find_faults(
        self, full_key: Collection[str], read: bool, progress: Callable[[int, int], None]
    ) -> dict[str, Fault]:
        found: dict[str, Fault] = {}
        to_read: dict[str, int] = {}
        for one in full_key:
            fault, size = self._glance(self.place(one), read=read)
            if fault:
                found[one] = fault
            elif size:
                to_read[one] = size
        if to_read:
            self._read_all(to_read, progress)
        for one in to_read:
            fault, size = self._glance(self.place(one), read=True)
            if fault or size:
                found[one] = fault or "damaged"
        return found

    def _glance(self, place: Path, *, read: bool) -> tuple[Fault | None, int]:
        """What is wrong with an entry as far as is known, and the bytes to read to know the rest.

        Note and file are looked at anew each time: other processes replace them.
        """
        try:
            stat = place.stat()
        except OSError:
            return "absent", 0
        note = read_note(place)
        if note is None:
            return "damaged", 0
        if note.sha256 is None:
            return "unchecked", 0
        if note.size != stat.st_size:
            return "damaged", 0
        if not read:
            return None, 0
        known = self._read.get(place)
        if known is None or known[0] != identity_of(stat):
            # One byte at least, so that an empty file is looked at too.
            return None, stat.st_size or 1
        return ("damaged" if known[1] != note.sha256 else None), 0

    def _read_all(self, sizes: Mapping[str, int], progress: Callable[[int, int], None]) -> None:
        """Take the digests of these entries."""
        from concurrent.futures import ThreadPoolExecutor, as_completed

        total, done = sum(sizes.values()), 0
        # An affinity mask, as Slurm sets one, leaves fewer cores than the machine has.
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
        pool = ThreadPoolExecutor(min(_READERS, max(2, count)), "check")
        try:
            futures = {pool.submit(self._read_one, self.place(one)): one for one in sizes}
            for future in as_completed(futures):
                future.result()
                done += sizes[futures[future]]
                progress(done, total)
        finally:
            # A signal need not wait for files that nobody has begun to read.
            pool.shutdown(cancel_futures=True)

    def _read_one(self, place: Path) -> None:
        try:
            before = identity_of(place.stat())
        except OSError:
            return
        try:
            self._read[place] = (before, digest_of(place))
        except OSError:  # A disk that can't read it is damage too.
            self._read[place] = (before, "")


def note_of(place: Path) -> Path:
    """Where the note of the entry at ``place`` lies."""
    return place.with_name(place.name + ".json")


def _write_note(arrival: FinishedFile, place: Path) -> Path:
    """Write a file's note, under a hidden name beside the place where that will lie.

    Not beside the file: an engine that is still at work deletes there what it does not know.
    """
    note = {
        "bytes": arrival.file.stat().st_size,
        "made_of": arrival.cache_inputs,
        "sha256": arrival.sha256 or digest_of(arrival.file),
    }
    text = json.dumps(note, sort_keys=True, indent=1, ensure_ascii=False)
    place.parent.mkdir(parents=True, exist_ok=True)
    hidden = place.with_name(f".{note_of(place).name}.{os.getpid()}.tmp")
    hidden.write_text(text, encoding="utf-8")
    return hidden


def _move(file: Path, place: Path) -> None:
    """Rename a synced file, or copy it whole where its place is on another file system."""
    try:
        file.replace(place)
    except OSError:
        with whole(place) as temporary:
            shutil.copyfile(file, temporary)
        shutil.copymode(file, place)
        file.unlink()


def read_note(place: Path) -> EntryInfo | None:
    """What the note of the entry at ``place`` says of it; None when there is none to be read."""
    try:
        note = json.loads(note_of(place).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(note, dict):
        return None
    return EntryInfo(note.get("bytes"), note.get("sha256"))


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name; nothing when there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda one: one.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
