"""Exceptions that nobody expected: one line for the person, the traceback in a file."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from runner.core.text import printable

LOG = "runner.log"


def guarded(
    call: Callable[[], int], redact: Callable[[str], str] = str, run_dir: Path | None = None
) -> int:
    """Call a program's main function.

    Args:
        call: the function; it returns the exit code.
        redact: removes secrets from a text.
        run_dir: as for :func:`describe`.

    Returns:
        The exit code; 1 after an exception, which is printed as one line, and 130 after Ctrl-C.
    """
    try:
        return call()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"error: {describe(error, redact, run_dir)}", file=sys.stderr)
        return 1


def describe(
    error: Exception, redact: Callable[[str], str] = str, run_dir: Path | None = None
) -> str:
    """Describe an exception that nobody expected, in one line, and write its traceback to a file.

    Args:
        error: the exception.
        redact: removes secrets from a text.
        run_dir: the run's folder, in whose ``logs`` the file is; None where there is no run.
    """
    said = redact(str(error)).strip().splitlines()
    what = printable(f"{type(error).__name__}: {said[0]}" if said else type(error).__name__)[:300]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    text = redact("".join(traceback.format_exception(error)))
    try:
        place = f"its traceback is in {_write(text, run_dir)}"
    except OSError as failure:
        place = f"its traceback could not be written ({failure.strerror or failure})"
    return f"unexpected {what}{where}; {place}"


def _write(text: str, run_dir: Path | None) -> Path:
    if run_dir is None:
        number, name = tempfile.mkstemp(prefix="runner-", suffix=".log")
        os.close(number)
        log = Path(name)
    else:
        log = run_dir / "logs" / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", errors="backslashreplace") as handle:
        handle.write(text)
    return log
