"""Paths as they are given and as they are shown."""

from __future__ import annotations

import os
from pathlib import Path


def absolute(path: str, cwd: Path) -> Path:
    """``path`` with ``~`` expanded, from ``cwd`` when it is relative."""
    return Path(os.path.normpath(cwd / Path(path).expanduser()))


def checkout() -> str | None:
    """The folder to put on PYTHONPATH when the runner is used from a checkout, else None."""
    top = Path(__file__).resolve().parents[2]
    return str(top) if (top / "pyproject.toml").is_file() else None


def shortest(path: Path) -> str:
    """A path as one would type it here: relative below the working folder, else absolute."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)
