"""Files that are whole or absent: written under another name, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, *, keep_suffix: bool = False, sync: bool = True) -> Iterator[Path]:
    """A place beside ``path`` to write to, which becomes ``path`` when the block ends well.

    The folder is made. The place is a hidden name with an ending that no reader of caches or
    LoRAs takes for one of its files; ``keep_suffix`` is for writers that go by the ending. Without
    ``sync`` a power cut may leave it torn, which is for what can be told from whole and made again.
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
    """Write ``content`` so that ``path`` is whole or as it was; ``sync`` as in :func:`whole`."""
    with whole(path, sync=sync) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write ``text`` as UTF-8 so that ``path`` is whole or as it was; ``sync`` as there."""
    write_bytes(path, text.encode("utf-8"), sync=sync)


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
