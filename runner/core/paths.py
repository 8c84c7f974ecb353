"""Paths as users type them and as messages show them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from runner.core.errors import UserError


def absolute(path: str, cwd: Path) -> Path:
    """Make ``path`` absolute: ``~`` is expanded, and a relative one starts at ``cwd``."""
    return Path(os.path.normpath(cwd / Path(path).expanduser()))


def checkout() -> str | None:
    """Return the folder to put on PYTHONPATH if the runner runs from a checkout, else None."""
    top = Path(__file__).resolve().parents[2]
    return str(top) if (top / "pyproject.toml").is_file() else None


def shortest(path: Path) -> str:
    """Shorten a path: relative if it is below the working folder, else absolute."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)


def command_here(module: str) -> str:
    """Return a command for one of the runner's modules that works in the user's shell.

    If this Python's environment is not activated, ``python`` alone would be another Python.
    """
    if module == "runner" and Path(sys.argv[0]).name == "runner":
        return "runner"
    on_path = shutil.which("python")
    ours = Path(sys.executable)
    # Not resolved: an environment's Python is a link to the one it was made with.
    known = on_path is not None and Path(on_path).parent == ours.parent
    return f"{'python' if known else shlex.quote(shortest(ours))} -m {module}"


def existing_file(key: str, text: str, cwd: Path) -> Path:
    """Return the absolute path of a file that an option names.

    Args:
        key: the option.
        text: its value, as typed.
        cwd: the folder that a relative path starts at.

    Raises:
        UserError: there is no such file.
    """
    path = absolute(text, cwd)
    if not path.is_file():
        raise UserError(f"{key}={text}: there is no such file.")
    return path
