"""The cause of a musubi-tuner failure, found in its log; accelerate starts the trainer."""

from __future__ import annotations

import re
from pathlib import Path

from runner.core.process import TRACEBACK, log_lines, signal_words

# What accelerate's launcher prints, in a traceback of its own, when its trainer failed.
_LAUNCHER = re.compile(
    r"subprocess\.CalledProcessError: Command .* "
    r"(?:died with <Signals\.(?P<signal>\w+): \d+>|returned non-zero exit status \d+)\.$"
)
# A process that ends after the launcher may print a few warnings below its traceback.
_LAUNCHER_LINES = 10


def trainer_lines(log: Path) -> list[str] | None:
    """Read the last lines of a log that are the program's own; None if it can't be read.

    If the last error is accelerate's report that its program failed, they end before it.
    """
    lines = log_lines(log)
    if lines is None:
        return None
    for number in reversed(range(max(0, len(lines) - _LAUNCHER_LINES), len(lines))):
        launcher = _LAUNCHER.match(lines[number])
        if launcher is None:
            continue
        if launcher["signal"]:
            return [f"the program was ended by {signal_words(launcher['signal'])}"]
        starts = [at for at in range(number) if lines[at].endswith(TRACEBACK)]
        return lines[: starts[-1] if starts else number] or lines
    return lines
