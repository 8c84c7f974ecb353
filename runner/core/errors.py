"""The two errors that end a run."""

from __future__ import annotations

import re
from pathlib import Path


class UserError(Exception):
    """A mistake in the options or the input; nothing was started (exit code 2).

    The message is one line: what is wrong, where, and what to do.
    """


class StageError(Exception):
    """A failure of a stage after work had begun (exit code 1); finished stages are kept.

    The message is one line and names the stage's log.
    """


# How the system, SQLite and libraries written in Rust say it.
_FULL = re.compile(r"No space left on device|disk is full|os error 28\b|Disk quota exceeded")


def plain_reason(text: str) -> str:
    """``text``, or plain words where a program ran out of disk."""
    return "the disk is full: free some space" if _FULL.search(text) else text


def describe_os_error(error: OSError, folder: Path | None = None) -> str:
    """Describe an operating system's error: what is wrong, and with which file or folder."""
    where = error.filename or folder
    return f"{error.strerror or error}: {where}" if where else f"{error.strerror or error}"
