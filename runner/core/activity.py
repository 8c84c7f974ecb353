"""Whether a command still does anything: what Linux counts for its processes, its log and files.

A process that computes is never called idle, however slow the computer is: it uses processor time,
or waits for a processor. One that waits for a GPU launches kernels, which takes processor time too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# Less processor time than this, as a share of the time passed, is no work: threads that look up now
# and then, such as a progress bar's, take a ten-thousandth.
_IDLE_SHARE = 1 / 500
_LOOK_SECONDS = 10.0
SAY_AFTER_SECONDS = 600.0


@dataclass(frozen=True)
class Stuck:
    """What to do about a command that does nothing any more.

    Attributes:
        say: called with the seconds it has done nothing for: after ``say_after``, then each time
            that these have doubled.
        end_after: seconds after which it is to be ended; None for never.
        say_after: see ``say``.
    """

    say: Callable[[float], None]
    end_after: float | None = None
    say_after: float = field(default_factory=lambda: SAY_AFTER_SECONDS)


class Activity:
    """Watches a command's processes, its log and its folder. Only Linux counts what it needs."""

    def __init__(self, session: int, log: Path, folder: Path, stuck: Stuck) -> None:
        """Start watching.

        Args:
            session: the number of the session that the command's processes are in.
            log: the file that its output goes to.
            folder: the folder that it writes files into.
            stuck: what to do.
        """
        self._session, self._log, self._folder, self._stuck = session, log, folder, stuck
        self._say_at = stuck.say_after
        self._look_every = min(_LOOK_SECONDS, stuck.say_after / 10, (stuck.end_after or 1e9) / 10)
        self._looked = time.monotonic()
        self._begin()

    def ended_after(self) -> float | None:
        """Look, if it is time to; return the seconds of idleness if the command is to be ended."""
        now = time.monotonic()
        if now - self._looked < self._look_every:
            return None
        self._looked = now
        idle = now - self._since
        used = _used(self._session)
        if used is None:
            return None
        if (
            used.waiting_for_processor
            or abs(used.seconds - self._used.seconds) > idle * _IDLE_SHARE
            or used.disk_bytes != self._used.disk_bytes
            or _size(self._log) != self._log_size
        ):
            self._begin()
            return None
        end_after = self._stuck.end_after
        to_end = end_after is not None and idle >= end_after
        if idle < self._say_at and not to_end:
            return None
        # Only now, as a folder can have a hundred thousand files.
        if self._wrote_since(time.time() - idle):
            self._begin()
            return None
        if to_end:
            return idle
        self._stuck.say(idle)
        self._say_at = 2 * idle
        return None

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._used = _used(self._session) or Used()
        self._log_size = _size(self._log)
        self._say_at = self._stuck.say_after

    def _wrote_since(self, when: float) -> bool:
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with suppress(OSError):
                    if Path(folder, name).lstat().st_mtime > when:
                        return True
        return False


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


@dataclass
class Used:
    """What the processes of a session have used so far.

    Attributes:
        seconds: processor time, with that of children that have ended.
        disk_bytes: bytes read from and written to disks.
        waiting_for_processor: whether one of them runs, or would if a processor were free.
    """

    seconds: float = 0.0
    disk_bytes: int = 0
    waiting_for_processor: bool = False


def _used(session: int) -> Used | None:
    """Sum up what a session has used, from /proc (proc_pid_stat(5), proc_pid_io(5)).

    Returns:
        The sums, or None if the system has no /proc.
    """
    used, found = Used(), False
    try:
        processes = [path for path in Path("/proc").iterdir() if path.name.isdecimal()]
    except OSError:
        return None
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    for folder in processes:
        try:
            # The second field is the program's name, in brackets and with any characters.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            found = True
            used.seconds += sum(map(int, fields[11:15])) / ticks_per_second
            used.waiting_for_processor |= fields[0] == "R"
            used.disk_bytes += sum(
                int(line.split()[1])
                for line in (folder / "io").read_text().splitlines()
                if line.startswith(("read_bytes:", "write_bytes:"))
            )
        except (OSError, ValueError, IndexError):
            continue  # it has just ended, or its counters may not be read
    return used if found else None
