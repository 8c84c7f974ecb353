"""What a person sees of a download: one bar for all of it, and a line for each file.

Where another process has the console, ``python -m runner.hub`` also writes what happens into the
file that the variable RUNNER_HUB_PROGRESS names, and a :class:`Follower` shows it there.
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
# How often bytes are written down for another process.
_SECONDS = 0.2
# Reading less than this takes no time worth showing.
_LONG = 500_000_000


class DownloadListener(Protocol):
    """Is told what happens; files are named by their number in the list that it begins with."""

    def begin(self, todo: Sequence[tuple[str, int, int]]) -> None:
        """These files (name, size, bytes of it that are here) will be brought."""

    def bytes(self, number: int, done: int) -> None:
        """A file being brought has so many bytes now."""

    def checking(self, name: str, done: int, size: int) -> None:
        """A file is being read to see that it is whole."""

    def brought(self, number: int) -> None:
        """A file is here and whole."""

    def line(self, text: str) -> None:
        """Something worth a line."""


class DownloadProgress(AbstractContextManager["DownloadProgress"]):
    """Show :func:`runner.hub.fetch.fetch_files` on a console and in ``progress_file``."""

    def __init__(self, console: Console, progress_file: Path | None = None) -> None:
        self._console = console
        self._progress_file = progress_file
        self._files: list[tuple[str, int]] = []
        self._done: list[int] = []
        self._bar: Bar | None = None
        self._reading: tuple[str, Bar] | None = None
        self._last = 0.0

    def begin(self, todo: Sequence[tuple[str, int, int]]) -> None:
        """A bar over all bytes, from those that are here."""
        self._tell("begin", todo)
        self._end_reading()
        self._files = [(name, size) for name, size, _ in todo]
        self._done = [here for _, _, here in todo]
        start, total = sum(self._done), sum(size for _, size in self._files)
        self._console.line(
            f"      {counted(len(todo), 'file')} to fetch, {readable(total)}"
            + (f" ({readable(start)} of it is here)" if start else "")
        )
        self._bar = self._console.bar("fetched", total, start=start, in_bytes=True).__enter__()

    def bytes(self, number: int, done: int) -> None:
        """The bar, and how far this file is."""
        self._tell("bytes", number, done, now=False)
        self._done[number] = done
        name, size = self._files[number]
        place = f"{number + 1}/{len(self._files)}"
        self._update(f"{place} {short(name)} {done / max(1, size):.0%}")

    def checking(self, name: str, done: int, size: int) -> None:
        """On the download's bar while there is one; else a bar of its own for large files."""
        self._tell("checking", name, done, size, now=done >= size)
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
        """One line for a file that is here."""
        self._tell("brought", number)
        name, size = self._files[number]
        self._done[number] = size
        self._console.line(f"      {name}  {readable(size)}")

    def line(self, text: str) -> None:
        """A notice."""
        self._tell("line", text)
        self._console.notice(text)

    def _tell(self, what: str, *given: object, now: bool = True) -> None:
        if self._progress_file is None or not (now or time.monotonic() - self._last >= _SECONDS):
            return
        self._last = time.monotonic()
        # A full disk ends the download with a line of its own.
        with suppress(OSError), self._progress_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([what, *given]) + "\n")

    def _update(self, detail: str) -> None:
        if self._bar is not None:
            self._bar.update(sum(self._done), detail)

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading[1].__exit__(None, None, None)
            self._reading = None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_reading()
        if self._bar is not None:
            self._bar.detail = ""
            self._bar.__exit__(exc_type, error, traceback)
            self._bar = None


class Follower(AbstractContextManager["Follower"]):
    """Shows on a console what another process, which has ``variables`` set, fetches."""

    def __init__(self, file: Path, console: Console) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        self._file, self._read, self._rest = file, 0, ""
        self._shown = DownloadProgress(console)
        self.variables = {VARIABLE: str(file.absolute())}

    def update(self) -> None:
        """Show what happened since the last time."""
        with self._file.open(encoding="utf-8") as file:
            file.seek(self._read)
            *lines, self._rest = (self._rest + file.read()).split("\n")
            self._read = file.tell()
        for line in lines:
            what, *given = json.loads(line)
            getattr(self._shown, what)(*given)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.update()
        self._shown.__exit__(exc_type, error, traceback)
        self._file.unlink(missing_ok=True)


def short(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= 40 else f"...{name[-37:]}"
