"""Takes secrets out of files, such as logs with what a trainer printed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

from runner.core.atomic import whole
from runner.tracking.secrets import redact


def hide_values(file: Path, secrets: Sequence[str]) -> None:
    """Rewrites ``file`` redacted if one of these values is in it; it is never there half.

    Raises OSError when it can't be read or rewritten.
    """
    if not secrets or not file.is_file() or file.stat().st_size == 0:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
        if all(held.find(secret.encode()) < 0 for secret in secrets):
            return
    with whole(file) as place:
        write_redacted(file, place, secrets)


def write_redacted(file: Path, copy: Path, secrets: Sequence[str]) -> bool:
    """Writes `file` without secrets to `copy`, byte for byte otherwise; True if any was hidden."""
    hidden = False
    # Bytes that are no UTF-8 pass through as they are.
    with (
        file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines,
        copy.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        for line in lines:
            safe = redact(line, secrets)
            hidden = hidden or safe != line
            out.write(safe)
    return hidden
