"""Paths as they are given and as they are shown."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from runner.core.errors import UserError


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


def command_here(module: str) -> str:
    """A command for one of the runner's modules that works in the shell it was started from.

    ``python`` alone is another Python where this one's environment is not activated.
    """
    if module == "runner" and Path(sys.argv[0]).name == "runner":
        return "runner"
    found = shutil.which("python")
    ours = Path(sys.executable)
    # Not resolved: an environment's Python is a link to the one it was made with.
    known = found is not None and Path(found).parent == ours.parent
    return f"{'python' if known else shlex.quote(shortest(ours))} -m {module}"


def existing_file(key: str, given: str, cwd: Path) -> Path:
    """The file that an option names, absolute. Raises :class:`UserError` if it is not there."""
    path = absolute(given, cwd)
    if not path.is_file():
        raise UserError(f"{key}={given}: there is no such file.")
    return path
