"""What a person sees of a download: one bar for all of it, and a line for each file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from runner.core.console import Bar, Console
from runner.core.text import counted, readable
from runner.hub.remote import RemoteFile

# Reading less than this takes no time worth showing.
_LONG = 500_000_000


class Shown(AbstractContextManager["Shown"]):
    """Shows :func:`runner.hub.fetch.obtain` on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done: dict[RemoteFile, int] = {}
        self._files: list[RemoteFile] = []
        self._bar: Bar | None = None
        self._reading: tuple[str, Bar] | None = None

    def begin(self, todo: Sequence[tuple[RemoteFile, int]]) -> None:
        """A bar over all bytes, from those that are here."""
        self._end_reading()
        self._files = [file for file, _ in todo]
        self._done = dict(todo)
        start = sum(self._done.values())
        total = sum(file.size for file, _ in todo)
        self._console.line(
            f"      {counted(len(todo), 'file')} to fetch, {readable(total)}"
            + (f" ({readable(start)} of it is here)" if start else "")
        )
        self._bar = self._console.bar("fetched", total, start=start, in_bytes=True).__enter__()

    def bytes(self, file: RemoteFile, done: int) -> None:
        """The bar, and how far this file is."""
        self._done[file] = done
        number = f"{self._files.index(file) + 1}/{len(self._files)}"
        self._update(f"{number} {short(file.name)} {done / max(1, file.size):.0%}")

    def checking(self, name: str, done: int, total: int) -> None:
        """On the download's bar while there is one; else a bar of its own for large files."""
        if self._bar is not None:
            self._update(f"checking {short(name)} {done / max(1, total):.0%}")
            return
        if total < _LONG:
            return
        if self._reading is None or self._reading[0] != name:
            self._end_reading()
            bar = self._console.bar(f"checked {short(name)}", total, in_bytes=True)
            self._reading = (name, bar.__enter__())
        self._reading[1].update(done)
        if done >= total:
            self._end_reading()

    def brought(self, file: RemoteFile) -> None:
        """One line for a file that is here."""
        self._done[file] = file.size
        self._console.line(f"      {file.name}  {readable(file.size)}")

    def line(self, text: str) -> None:
        """A notice."""
        self._console.notice(text)

    def _update(self, detail: str) -> None:
        if self._bar is not None:
            self._bar.update(sum(self._done.values()), detail)

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading[1].__exit__(None, None, None)
            self._reading = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_reading()
        if self._bar is not None:
            self._bar.detail = ""
            self._bar.__exit__(kind, error, traceback)
            self._bar = None


def short(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= 40 else f"...{name[-37:]}"
