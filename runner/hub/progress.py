"""The progress of a download: one bar for all of it, and a line for each file.

If another process owns the console, ``python -m runner.hub`` writes its progress to the file that
the variable RUNNER_HUB_PROGRESS names, and that process shows it with a :class:`Follower`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from runner.core.console import Bar, Console
from runner.core.text import counted, readable

VARIABLE = "RUNNER_HUB_PROGRESS"
# The least time between two reports of bytes to another process.
_SECONDS = 0.2
# Smaller files are verified so fast that a bar is not worth it.
_LONG = 500_000_000


class DownloadListener(Protocol):
    """A listener to a download; it gets a list of files first, and then their indices in it."""

    def begin(self, todo: Sequence[tuple[str, int, int]]) -> None:
        """Start the download of these files: name, size, and bytes already present."""

    def bytes(self, number: int, done: int) -> None:
        """Report that ``done`` bytes of a file are present."""

    def checking(self, name: str, done: int, size: int) -> None:
        """Report that ``done`` bytes of a file were verified."""

    def brought(self, number: int) -> None:
        """Report that a file was downloaded and verified."""

    def line(self, text: str) -> None:
        """Show a message to the user."""


class DownloadProgress(AbstractContextManager["DownloadProgress"]):
    """A listener that shows a download on a console and records it in ``progress_file``."""

    def __init__(self, console: Console, progress_file: Path | None = None) -> None:
        self._console = console
        self._progress_file = progress_file
        self._files: list[tuple[str, int]] = []
        self._done: list[int] = []
        self._left = 0
        self._bar: Bar | None = None
        self._reading: tuple[str, Bar] | None = None
        self._last = 0.0

    def begin(self, todo: Sequence[tuple[str, int, int]]) -> None:
        """Open a bar over all bytes, beginning with those that are present."""
        self._record("begin", todo)
        self._end_reading()
        self._files = [(name, size) for name, size, _ in todo]
        self._done = [present for _, _, present in todo]
        self._left = len(todo)
        start, total = sum(self._done), sum(size for _, size in self._files)
        self._console.line(
            f"      {counted(len(todo), 'file')} to fetch, {readable(total)}"
            + (f" ({readable(start)} of it is here)" if start else "")
        )
        self._bar = self._console.bar("fetched", total, start=start, in_bytes=True).__enter__()

    def bytes(self, number: int, done: int) -> None:
        """Update the bar and the percentage of this file."""
        self._record("bytes", number, done, now=False)
        self._done[number] = done
        name, size = self._files[number]
        position = f"{number + 1}/{len(self._files)}"
        self._update(f"{position} {short(name)} {done / max(1, size):.0%}")

    def checking(self, name: str, done: int, size: int) -> None:
        """Show a verification in the download's bar, or in a separate bar for a large file."""
        self._record("checking", name, done, size, now=done >= size)
        if self._bar is not None:
            self._update(f"checking {short(name)} {done / max(1, size):.0%}")
            return
        if size < _LONG:
            return
        if self._reading is None or self._reading[0] != name:
            self._end_reading()
            bar = self._console.bar(f"checked {short(name)}", size, in_bytes=True)
            self._reading = (name, bar.__enter__())
        self._reading[1].update(done)
        if done >= size:
            self._end_reading()

    def brought(self, number: int) -> None:
        """Print a line for a finished file; the last one ends the bar."""
        self._record("brought", number)
        name, size = self._files[number]
        self._done[number] = size
        self._console.line(f"      {name}  {readable(size)}")
        self._left -= 1
        if not self._left:
            self._end_bar()

    def line(self, text: str) -> None:
        """Print a notice."""
        self._record("line", text)
        self._console.notice(text)

    def _record(self, event: str, *arguments: object, now: bool = True) -> None:
        if self._progress_file is None or not (now or time.monotonic() - self._last >= _SECONDS):
            return
        self._last = time.monotonic()
        # If the disk is full, the download itself reports that.
        with suppress(OSError), self._progress_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([event, *arguments]) + "\n")

    def _update(self, detail: str) -> None:
        if self._bar is not None:
            self._bar.update(sum(self._done), detail)

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading[1].__exit__(None, None, None)
            self._reading = None

    def _end_bar(
        self,
        exc_type: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if self._bar is not None:
            self._bar.update(sum(self._done))
            self._bar.detail = ""
            self._bar.__exit__(exc_type, error, traceback)
            self._bar = None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_reading()
        self._end_bar(exc_type, error, traceback)


class Follower(AbstractContextManager["Follower"]):
    """A console view of the downloads of another process, started with ``variables``."""

    def __init__(self, file: Path, console: Console) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        self._file, self._read, self._rest = file, 0, ""
        self._progress = DownloadProgress(console)
        self.variables = {VARIABLE: str(file.absolute())}

    def update(self) -> None:
        """Show what happened since the last call."""
        with self._file.open(encoding="utf-8") as file:
            file.seek(self._read)
            *lines, self._rest = (self._rest + file.read()).split("\n")
            self._read = file.tell()
        for line in lines:
            event, *arguments = json.loads(line)
            getattr(self._progress, event)(*arguments)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.update()
        self._progress.__exit__(exc_type, error, traceback)
        self._file.unlink(missing_ok=True)


def short(name: str) -> str:
    """Shorten a long path to its end."""
    return name if len(name) <= 40 else f"...{name[-37:]}"
