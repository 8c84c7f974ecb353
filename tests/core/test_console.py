"""What a bar shows in a file, where there is no terminal."""

from __future__ import annotations

import io
import itertools

import pytest

from runner.core.console import Console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a minute after the one before."""
    minutes = itertools.count(step=60.0)
    monkeypatch.setattr("runner.core.console.time.monotonic", lambda: next(minutes))


def minutes_of(line: str) -> int:
    return int(line.split(" elapsed")[0].split()[-1].split(":")[0])


# Before the first of them is through a line says what goes on, and the time since the start goes
# on when it is.
def test_the_clock_runs_from_the_start(clock: None) -> None:
    out = io.StringIO()
    with Console.for_stream(out).bar("steps", 4, detail="starting the trainer") as bar:
        bar.tick()
        bar.update(1, "loss 1.0")
        bar.update(2, "loss 0.5")
    first, *rest = [line.strip() for line in out.getvalue().splitlines()]
    assert first.startswith("steps 0/4  starting the trainer  ")
    times = [minutes_of(line) for line in (first, *rest)]
    assert times == sorted(set(times))
    assert " left" in rest[-1]


# A line now and then is enough in a file, and none says the same again.
def test_few_lines_in_a_file() -> None:
    out = io.StringIO()
    with Console.for_stream(out).bar("steps", 900) as bar:
        for step in range(1, 901):
            bar.update(step)
            bar.tick()
    assert out.getvalue().strip().startswith("steps 900/900")
    assert out.getvalue().count("\n") == 1


# What is made on the way has a row of its own, which is updated when it changes.
def test_a_bar_beside() -> None:
    out = io.StringIO()
    with Console.for_stream(out).bar("steps", 4) as bar:
        for made in (0, 0, 1, 1, 2):
            bar.beside("previews", made, 2)
    rows = [line.strip() for line in out.getvalue().splitlines()]
    assert rows[:2] == ["previews 1/2", "previews 2/2"]
    assert rows[2].startswith("steps 0/4")
