"""Redaction of files, such as the logs of what a trainer printed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

from runner.core.atomic import whole
from runner.tracking.secrets import redact


def hide_values(file: Path, secrets: Sequence[str]) -> None:
    """Redact a file atomically if it contains one of these values.

    Raises:
        OSError: the file can't be read or rewritten.
    """
    if not secrets or not file.is_file() or file.stat().st_size == 0:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
        if all(held.find(secret.encode()) < 0 for secret in secrets):
            return
    with whole(file) as redacted_file:
        write_redacted(file, redacted_file, secrets)


def write_redacted(file: Path, copy: Path, secrets: Sequence[str]) -> bool:
    """Write ``file`` to ``copy`` without secrets, otherwise byte for byte.

    Returns:
        Whether a secret was hidden.
    """
    hidden = False
    # Bytes that are not UTF-8 are copied unchanged.
    with (
        file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines,
        copy.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        for line in lines:
            safe = redact(line, secrets)
            hidden = hidden or safe != line
            out.write(safe)
    return hidden
