"""What a person sees: colours and bars on a terminal, plain lines in a file."""

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

# In a file a line of progress is worth having only now and then.
PLAIN_SECONDS = 10.0


class Console:
    """Prints to one stream."""

    def __init__(self, rich: RichConsole) -> None:
        self._rich = rich
        self.fancy = rich.is_terminal and not rich.is_dumb_terminal
        # Notices that must not come before the error that they are less than.
        self.after_error: list[str] = []

    @classmethod
    def for_stream(cls, stream: TextIO) -> Console:
        """A console for ``stream``: fancy when that is a terminal."""
        from rich.console import Console as RichConsole

        if isinstance(stream, io.TextIOWrapper):
            # A terminal may have no letters for a path's name, and a name need not be UTF-8.
            stream.reconfigure(errors="backslashreplace")
        # Rich would wrap a file's lines at 80; there every line stays whole.
        width = None if stream.isatty() else 10_000
        no_color = bool(os.environ.get("NO_COLOR"))
        return cls(RichConsole(file=stream, width=width, no_color=no_color, highlight=False))

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print one line as it is."""
        self._rich.print(text, style=style, markup=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        self.line()
        self.line(text, style="bold")

    def notice(self, text: str) -> None:
        """Something worth knowing that stops nothing."""
        # Rich breaks a long line between words.
        self._rich.print(f"note: {text}", style="yellow", markup=False)

    def error(self, text: str) -> None:
        """The one line that says what is wrong; on standard error."""
        from rich.console import Console as RichConsole

        RichConsole(stderr=True, highlight=False, width=None if self.fancy else 10_000).print(
            f"error: {text}", style="bold red", markup=False
        )
        while self.after_error:
            self.notice(self.after_error.pop(0))

    def stage(self, number: int, count: int, name: str, summary: str) -> None:
        """A stage begins, or is seen to be done."""
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
            total: how many there are.
            start: how many of them were there before.
            in_bytes: whether bytes are counted.
            detail: what is going on before the first.
        """
        return Bar(self, what, total, start=start, in_bytes=in_bytes, detail=detail)

    def progress(self, clock: Callable[[], str], *, in_bytes: bool) -> Progress:
        """Bars on a terminal; ``clock`` gives the times of the first one, a few times a second."""
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
    """A bar on a terminal; a line every ten seconds and one at the end elsewhere."""

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
        """``done`` of the total are through; ``left`` seconds remain, where that is known."""
        self.done, self.detail, self.left = done, detail or self.detail, left
        if self._progress is not None:
            self._progress.update(self._task, completed=done, detail=self.detail)
        if self._first is None and done > self.start:
            self._first = (done, time.monotonic())
        self.tick()

    def tick(self) -> None:
        """Show that time goes by, where no terminal does."""
        if self._progress is None and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._print()

    def beside(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` of something that is made on the way, on a bar below this one."""
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
            words = [f"      {self.what} {readable(self.done)} of {readable(self.total)}"]
            if made > 0 and seconds > 0:
                words.append(f"{readable(made / seconds)}/s")
            words.append(self.detail)
        else:
            words = [f"      {self.what} {self.done}/{self.total}", self.detail]
        words.append(self._clock())
        line = "  ".join(word for word in words if word)
        if line != self._last:
            self.console.line(line)
        self._last = line

    def _clock(self) -> str:
        """The time since the start, and the time left where that is known."""
        words = f"{duration(time.monotonic() - self._started)} elapsed"
        left = self.left if self.left is not None else self._left()
        if left is not None and self.done < self.total:
            words += f", {duration(left)} left"
        return words

    def _left(self) -> float | None:
        """Seconds left at the pace since the first was through; start-up is not counted."""
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
