"""The shared cache: finished work under ``outputs/cache``, named by what went into it.

An entry is written under a temporary name, synced and renamed, and is read-only from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from runner.atomic import sync_folder, whole, write_text

Shelf = Literal["media", "latents", "text"]
SHELVES: tuple[Shelf, ...] = ("media", "latents", "text")


def key_of(made_of: Mapping[str, Any]) -> str:
    """The name of an entry: a digest of everything it is made of."""
    text = json.dumps(made_of, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def link(target: Path, place: Path) -> None:
    """Put ``target`` at ``place``: a symbolic link, or a copy where links can't be made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(target)
    except OSError:
        with whole(place) as temporary:
            shutil.copyfile(target, temporary)


class Store:
    """Entries on three shelves: extracted media, latents and text embeddings."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, shelf: Shelf, name: str) -> Path:
        """Where an entry lies, or will lie."""
        return self.root / shelf / name[:2] / name

    def has(self, shelf: Shelf, name: str) -> bool:
        return self.path(shelf, name).is_file()

    def names(self) -> frozenset[str]:
        """``shelf/name`` of every entry."""
        return frozenset(f"{shelf}/{file.name}" for shelf in SHELVES for file in self._files(shelf))

    def _files(self, shelf: Shelf) -> Iterator[Path]:
        folder = self.root / shelf
        for part in sorted(folder.iterdir()) if folder.is_dir() else ():
            for file in sorted(part.iterdir()):
                if not file.name.startswith(".") and file.suffix != ".json":
                    yield file

    def commit(self, shelf: Shelf, name: str, file: Path, made_of: Mapping[str, Any]) -> Path:
        """Move a finished ``file`` into the store; an entry that is there already stays."""
        place = self.path(shelf, name)
        if place.is_file():
            file.unlink()
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        note = place.with_name(name + ".json")
        write_text(note, json.dumps(made_of, sort_keys=True, indent=1, ensure_ascii=False))
        file.chmod(0o444)
        try:
            file.replace(place)
        except OSError:  # Another file system: copy beside the place first, then rename.
            with whole(place) as temporary:
                shutil.copyfile(file, temporary)
            place.chmod(0o444)
            file.unlink()
        sync_folder(place.parent)
        return place

    @contextmanager
    def lock(self, shelf: Shelf, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold a shelf while its missing entries are made, so that two runs make each once.

        The lock belongs to the process and is released by the system when that dies.
        ``on_wait`` is called when another process holds it.
        """
        from filelock import FileLock, Timeout

        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / f"{shelf}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
