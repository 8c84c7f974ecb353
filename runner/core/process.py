"""Run a command: its own process group, its output in a log, signals passed on."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.core.errors import StageError, plain_reason

# How long a stopped command may take to end by itself before it is killed.
GRACE_SECONDS = 15.0

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the run to end. Not an Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return Stopped, (self.number,)  # what a launcher brings back from another process

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as a shell reports it."""
        return 128 + self.number


def raise_on_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into :class:`Stopped` in the main thread."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, stop)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Hold back signals inside, so that what is begun there is also ended; raise them after.

    For short work that must not stop half-way, such as opening or closing a run's record.
    """
    received: list[int] = []

    def remember(number: int, _frame: object) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Stopped(received[0])


def run(
    argv: tuple[str, ...],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    on_tick: Callable[[], None] | None = None,
    tick_seconds: float = 0.25,
    explain: Callable[[Path], str] | None = None,
) -> None:
    """Run ``argv`` to its end, its output appended to ``log``.

    ``on_tick`` is called a few times a second. Raises :class:`StageError` when the command fails,
    with what ``explain`` (:func:`last_error` unless given) makes of its log; on :class:`Stopped`
    the whole process group is ended first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env={**env, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise StageError(f"{argv[0]} could not be started: {error.strerror}.") from error
        try:
            while process.poll() is None:
                if on_tick is not None:
                    on_tick()
                try:
                    process.wait(timeout=tick_seconds)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            # A second signal must not leave the command running.
            with signals_deferred():
                end_group(process)
            raise
    if process.returncode:
        why = (explain or last_error)(log)
        raise StageError(f"{why} ({_ended(process.returncode)}; log: {log})")


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = next((item.name for item in signal.Signals if item == -code), f"signal {-code}")
    return f"ended by {signal_words(name)}"


def _end_with_parent() -> None:
    """In the new process: ask Linux to end it when the runner is killed outright."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and everything it started: first asked, then killed."""
    _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


TRACEBACK = "Traceback (most recent call last):"
# What is missing from a model can be told in more than 20 kB, on one line.
_WINDOW = 1_000_000
_MOST = 500
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# "train.py: error: ..." is how argparse refuses an argument, "error: ..." how the runner's own
# executables do.
_REFUSAL = re.compile(r"(?:[^\s:]+: )?error: ")
_KILLED = {"SIGKILL": "SIGKILL, as the system does when memory runs out"}


def last_error(log: Path) -> str:
    """The line of a log that best says what went wrong: the last that is an error, or the last."""
    lines = log_lines(log)
    return "it failed and left no log" if lines is None else best_line(lines)


def log_lines(log: Path) -> list[str] | None:
    """The lines of a log's end that hold something, without colours; None when it can't be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _WINDOW))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    # Progress bars rewrite their line with carriage returns, which split lines here.
    return [line.rstrip() for line in _ANSI.sub("", text).splitlines() if line.strip()]


def best_line(lines: list[str]) -> str:
    """The line that best says what went wrong, cut to a length that can be read."""
    if not lines:
        return "it failed and printed nothing"
    best = plain_reason(_raised(lines) or _last_error_line(lines) or lines[-1].strip())
    return best if len(best) <= _MOST else f"{best[:_MOST]} ..."


def signal_words(name: str) -> str:
    """A signal that ended a process, with what that usually means."""
    return _KILLED.get(name, name)


def _raised(lines: list[str]) -> str | None:
    """What the last traceback ends with, unless the program refused its options after it."""
    for start in reversed(range(len(lines))):
        if not lines[start].endswith(TRACEBACK):
            continue
        # What Python could not clean up at its end did not make it end.
        if start and lines[start - 1].startswith("Exception ignored in"):
            continue
        after = [line for line in lines[start + 1 :] if not line[0].isspace()]
        refusals = [line for line in after[1:] if _REFUSAL.match(line)]
        return refusals[-1] if refusals else next(iter(after), None)
    return None


def _last_error_line(lines: list[str]) -> str | None:
    for line in reversed(lines):
        head, _, rest = line.strip().partition(":")
        if " " not in head and (
            head.endswith(("Error", "Exception", "error", "Interrupt", "Exit"))
            or rest.startswith(" error: ")
        ):
            return line.strip()
    return None
