"""Atomic writes: a file is written under a temporary name, synced and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, *, keep_suffix: bool = False, sync: bool = True) -> Iterator[Path]:
    """Write a file atomically: a temporary file replaces ``path`` if the block succeeds.

    Args:
        path: the file to write; its folder is made if missing.
        keep_suffix: whether the temporary name ends as ``path`` does, for writers that choose the
            format by it. Otherwise no reader of cache files or LoRAs takes it for one of them.
        sync: False is faster, but a power failure may leave a truncated file: only for files that
            are validated when read and can be made again.

    Yields:
        The temporary path, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp{path.suffix if keep_suffix else ''}"
    )
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write ``content`` to ``path`` atomically; ``sync`` as in :func:`whole`."""
    with whole(path, sync=sync) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically; ``sync`` as in :func:`whole`."""
    write_bytes(path, text.encode("utf-8"), sync=sync)


def sync(path: Path) -> None:
    """Flush a file's bytes, or the renames in a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
