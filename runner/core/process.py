"""Run a command in a process group of its own, with its output in a log."""

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

from runner.core.activity import Activity, Stuck
from runner.core.errors import StageError, plain_reason
from runner.core.text import counted

# Seconds that a stopped command has to end by itself before it is killed.
GRACE_SECONDS = 15.0

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal that ends the run; not an Exception, so that nothing treats it as a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return Stopped, (self.number,)  # needed by launchers that pickle it in another process

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
    """Hold back signals during the block; raise the first one after it.

    For short work that must not stop half-way, such as opening or closing a run's record. Where the
    block is part of ending for an earlier signal, that one stands.
    """
    received: list[int] = []
    ending = isinstance(sys.exc_info()[1], Stopped)

    def remember(number: int, _frame: object) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and not ending:
        raise Stopped(received[0])


def run(
    argv: tuple[str, ...],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    on_tick: Callable[[], None] | None = None,
    tick_seconds: float = 0.25,
    explain: Callable[[Path, int], str] | None = None,
    stuck: Stuck | None = None,
) -> None:
    """Run a command and wait for its end; on an exception, end its whole process group first.

    Args:
        argv: the command.
        cwd: its working folder.
        env: its environment.
        log: the file that its output is appended to.
        on_tick: called every ``tick_seconds`` while it runs.
        tick_seconds: the interval.
        explain: turns log and exit code of a failed command into a message (default:
            :func:`last_error`).
        stuck: what to do about a command that does nothing any more (default: nothing).

    Raises:
        StageError: the command can't be started, fails, or was ended because it was stuck.
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
        activity = Activity(process.pid, log, cwd, stuck) if stuck is not None else None
        try:
            while process.poll() is None:
                if on_tick is not None:
                    on_tick()
                if activity is not None and (idle := activity.ended_after()) is not None:
                    raise StageError(f"it was ended after {idle_words(idle, log)} (log: {log})")
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
        reason = explain(log, process.returncode) if explain is not None else last_error(log)
        raise StageError(f"{reason} ({_ended(process.returncode)}; log: {log})")


def idle_words(seconds: float, log: Path) -> str:
    """Describe what a command that does nothing was last known to do."""
    minutes = f"{seconds / 60:.0f} minutes" if seconds >= 90 else counted(round(seconds), "second")
    last = (log_lines(log) or ["nothing"])[-1].strip()
    return f"{minutes} without any progress; the last line of its log is: {shortened(last, 200)}"


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = next((sig.name for sig in signal.Signals if sig == -code), f"signal {-code}")
    return f"ended by {signal_words(name)}"


def _end_with_parent() -> None:
    """In the new process: ask Linux to end it if the runner is killed."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and everything it started: SIGTERM first, SIGKILL after the grace period."""
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
# Bytes read from the end of a log; a "missing keys" error can exceed 20 kB on one line.
_WINDOW = 1_000_000
_MAX_LENGTH = 500
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# "train.py: error: ..." is how argparse refuses an argument, "error: ..." how the runner's own
# executables do.
_REFUSAL = re.compile(r"(?:[^\s:]+: )?error: ")
_KILLED = {"SIGKILL": "SIGKILL, as the system does when memory runs out"}


def last_error(log: Path) -> str:
    """Return the line of a log that best says what went wrong: the last error, or the last line."""
    lines = log_lines(log)
    return "it failed and left no log" if lines is None else best_line(lines)


def log_lines(log: Path) -> list[str] | None:
    """Read the last non-empty lines of a log, without colours; None when it can't be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _WINDOW))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    # Progress bars rewrite their line with carriage returns, which split lines here.
    return [line.rstrip() for line in _ANSI.sub("", text).splitlines() if line.strip()]


def notices(log: Path) -> Iterator[str]:
    """Yield what a process said in lines of its log that begin with ``note: ``."""
    with suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("note: "):
                yield line.removeprefix("note: ").rstrip()


def best_line(lines: list[str]) -> str:
    """Return the line that best says what went wrong, cut to a readable length."""
    if not lines:
        return "it failed and printed nothing"
    best = plain_reason(_raised(lines) or _last_error_line(lines) or lines[-1].strip())
    return shortened(best, _MAX_LENGTH)


def shortened(text: str, length: int) -> str:
    """Cut a text between two words, if it is longer than ``length``."""
    if len(text) <= length:
        return text
    head = text[: length + 1].rpartition(" ")[0]
    # One endless word is cut where it must be.
    return f"{head if len(head) > length // 2 else text[:length]} ..."


def signal_words(name: str) -> str:
    """Describe a signal that ended a process, with its usual cause."""
    return _KILLED.get(name, name)


def _raised(lines: list[str]) -> str | None:
    """Return the end of the last traceback, or a refusal of options printed after it."""
    for start in reversed(range(len(lines))):
        if not lines[start].endswith(TRACEBACK):
            continue
        # Errors ignored during interpreter shutdown are not the cause.
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
