"""Files that are whole or absent: written under another name, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, *, keep_suffix: bool = False) -> Iterator[Path]:
    """A place beside ``path`` to write to, which becomes ``path`` when the block ends well.

    The folder is made. The place is a hidden name with an ending that no reader of caches or
    LoRAs takes for one of its files; ``keep_suffix`` is for writers that go by the ending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp{path.suffix if keep_suffix else ''}"
    )
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` is whole or as it was."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 so that ``path`` is whole or as it was."""
    write_bytes(path, text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
