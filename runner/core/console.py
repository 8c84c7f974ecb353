"""Output for the user: colours and bars on a terminal, plain lines in a file."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from runner.core.text import duration, readable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

# Seconds between lines of progress where the output is no terminal.
PLAIN_SECONDS = 10.0


class Console:
    """Output to one stream."""

    def __init__(self, rich: RichConsole) -> None:
        self._rich = rich
        self.fancy = rich.is_terminal and not rich.is_dumb_terminal
        # Notices to print after the error.
        self.after_error: list[str] = []

    @classmethod
    def for_stream(cls, stream: TextIO) -> Console:
        """Make a console for ``stream``: fancy when that is a terminal."""
        from rich.console import Console as RichConsole

        if isinstance(stream, io.TextIOWrapper):
            # The stream's encoding may lack characters of a path, and a path need not be UTF-8.
            stream.reconfigure(errors="backslashreplace")
        # Rich would wrap a file's lines at 80; there every line stays whole.
        width = None if stream.isatty() else 10_000
        no_color = bool(os.environ.get("NO_COLOR"))
        return cls(RichConsole(file=stream, width=width, no_color=no_color, highlight=False))

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print one line unchanged."""
        self._rich.print(text, style=style, markup=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Print a heading after an empty line."""
        self.line()
        self.line(text, style="bold")

    def notice(self, text: str) -> None:
        """Print something worth knowing that does not stop the run."""
        # Rich breaks a long line between words.
        self._rich.print(f"note: {text}", style="yellow", markup=False)

    def error(self, text: str) -> None:
        """Print the line that says what is wrong to standard error, then the notices held back."""
        from rich.console import Console as RichConsole

        RichConsole(stderr=True, highlight=False, width=None if self.fancy else 10_000).print(
            f"error: {text}", style="bold red", markup=False
        )
        while self.after_error:
            self.notice(self.after_error.pop(0))

    def stage(self, number: int, count: int, name: str, summary: str) -> None:
        """Print that a stage starts, or that it is done already."""
        self.line(f"[{number}/{count}] {name:<9} {summary}", style="bold cyan")

    def bar(
        self,
        what: str,
        total: int,
        *,
        start: int = 0,
        in_bytes: bool = False,
        detail: str = "",
    ) -> Bar:
        """Make a bar.

        Args:
            what: what is counted, in the plural.
            total: the number of units.
            start: how many of them were done before.
            in_bytes: whether the units are bytes.
            detail: what is going on until the first :meth:`Bar.update`.
        """
        return Bar(self, what, total, start=start, in_bytes=in_bytes, detail=detail)

    def progress(self, clock: Callable[[], str], *, in_bytes: bool) -> Progress:
        """Make bars for a terminal; ``clock`` returns the times shown behind the first one."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TransferSpeedColumn,
        )
        from rich.text import Text

        class Clock(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(clock() if task.id == 0 else "")

        return Progress(
            TextColumn("      {task.description}"),
            BarColumn(bar_width=None),
            *((DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)),
            TextColumn("{task.fields[detail]}"),
            Clock(),
            console=self._rich,
            transient=True,
        )


class Bar(AbstractContextManager["Bar"]):
    """A bar on a terminal; elsewhere a line every ten seconds and one at the end."""

    def __init__(
        self,
        console: Console,
        what: str,
        total: int,
        *,
        start: int = 0,
        in_bytes: bool = False,
        detail: str = "",
    ) -> None:
        self.console, self.what, self.total = console, what, total
        self.start, self.in_bytes = start, in_bytes
        self.done = start
        self.detail = detail
        self.left: float | None = None
        self._others: dict[str, tuple[int, TaskID | None]] = {}
        self._started = time.monotonic()
        self._printed = self._started
        self._last = ""
        self._first: tuple[int, float] | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        if self.console.fancy:
            self._progress = self.console.progress(self._clock, in_bytes=self.in_bytes)
            self._task = self._progress.add_task(
                self.what, total=self.total, completed=self.start, detail=self.detail
            )
            self._progress.start()
        return self

    def update(self, done: int, detail: str = "", left: float | None = None) -> None:
        """Show that ``done`` units are finished; ``left``: the seconds that remain, if known."""
        self.done, self.detail, self.left = done, detail or self.detail, left
        if self._progress is not None:
            self._progress.update(self._task, completed=done, detail=self.detail)
        if self._first is None and done > self.start:
            self._first = (done, time.monotonic())
        self.tick()

    def tick(self) -> None:
        """Print the next line of progress if it is due, where there is no terminal."""
        if self._progress is None and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._print()

    def beside(self, what: str, done: int, total: int) -> None:
        """Show the progress of something made meanwhile, such as previews, on a bar below."""
        before, task = self._others.get(what, (-1, None))
        if done == before:
            return
        if self._progress is None:
            if done:
                self.console.line(f"      {what} {done}/{total}")
        elif task is None:
            task = self._progress.add_task(what, total=total, completed=done, detail="")
        else:
            self._progress.update(task, completed=done)
        self._others[what] = (done, task)

    def _print(self) -> None:
        seconds = time.monotonic() - self._started
        made = self.done - self.start
        if self.in_bytes:
            parts = [f"      {self.what} {readable(self.done)} of {readable(self.total)}"]
            if made > 0 and seconds > 0:
                parts.append(f"{readable(made / seconds)}/s")
            parts.append(self.detail)
        else:
            parts = [f"      {self.what} {self.done}/{self.total}", self.detail]
        parts.append(self._clock())
        line = "  ".join(part for part in parts if part)
        if line != self._last:
            self.console.line(line)
        self._last = line

    def _clock(self) -> str:
        """Return the time since the start, and the time left if that is known."""
        text = f"{duration(time.monotonic() - self._started)} elapsed"
        left = self.left if self.left is not None else self._left()
        if left is not None and self.done < self.total:
            text += f", {duration(left)} left"
        return text

    def _left(self) -> float | None:
        """Estimate the seconds left, from the first finished unit on, without start-up."""
        if self._first is None:
            return None
        first, when = self._first
        if self.done <= first:
            return None
        return (time.monotonic() - when) / (self.done - first) * (self.total - self.done)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._print()
