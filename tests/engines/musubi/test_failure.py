"""What is reported of a musubi-tuner process that failed: its own error, not its launcher's."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.core.process import best_line
from runner.engines.musubi.failure import trainer_lines


def failure(log: Path) -> str:
    """What of a log is reported."""
    lines = trainer_lines(log)
    assert lines is not None
    return best_line(lines)


LAUNCHER = (
    "Traceback (most recent call last):\n"
    '  File "/venv/lib/accelerate/commands/launch.py", line 5, in simple_launcher\n'
    "    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=cmd)\n"
    "subprocess.CalledProcessError: Command '['/venv/bin/python', '-m', 'musubi.train']' {}.\n"
)


# accelerate's launcher ends every failure with its own traceback: the trainer's error is reported.
@pytest.mark.parametrize(
    ("said", "how", "expected"),
    [
        (
            "Traceback (most recent call last):\n  File x\nValueError: no such scheduler\n",
            "returned non-zero exit status 1",
            "ValueError: no such scheduler",
        ),
        (
            "usage: train.py [-h]\ntrain.py: error: unrecognized arguments: --rnak 3\n",
            "returned non-zero exit status 2",
            "train.py: error: unrecognized arguments: --rnak 3",
        ),
        (
            "OSError: an older, harmless one\nsteps: 3%\n",
            "died with <Signals.SIGKILL: 9>",
            "the program was ended by SIGKILL, as the system does when memory runs out",
        ),
    ],
)
def test_the_trainers_own_error_is_reported(
    tmp_path: Path, said: str, how: str, expected: str
) -> None:
    log = tmp_path / "log"
    log.write_text(said + LAUNCHER.format(how))
    assert failure(log) == expected


WARNING = (
    "/usr/lib/python3.10/multiprocessing/resource_tracker.py:224: UserWarning: resource_tracker: "
    "There appear to be 1 leaked semaphore objects to clean up at shutdown\n"
    "  warnings.warn('resource_tracker: x')\n"
)
RAISED = "Traceback (most recent call last):\n  File x\n    f()\n"
FAILED = "returned non-zero exit status 1"


# The reported error is the one that ended the trainer, short and without colours, whatever its name
# and however much is printed before it, in it or after it.
@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            f"{RAISED}RuntimeError: Error(s) in loading state_dict for Model:\n\tMissing key(s): "
            + "k, " * 90_000
            + "\n"
            + LAUNCHER.format(FAILED),
            "RuntimeError: Error(s) in loading state_dict for Model:",
        ),
        (
            f"{RAISED}ImportError: a harmless one\nsteps: 3%{RAISED}"
            "voluptuous.error.MultipleInvalid: extra keys not allowed @ data\n"
            + LAUNCHER.format(FAILED),
            "voluptuous.error.MultipleInvalid: extra keys not allowed @ data",
        ),
        (f"{RAISED}StopIteration\nHint: see docs\n", "StopIteration"),
        (f"{RAISED}ValueError: bad\n{LAUNCHER.format(FAILED)}{WARNING}", "ValueError: bad"),
        (
            LAUNCHER.format("died with <Signals.SIGKILL: 9>") + WARNING,
            "the program was ended by SIGKILL, as the system does when memory runs out",
        ),
        (
            "\x1b[1;31mTraceback (most recent call last):\x1b[0m\n  File x\n"
            "\x1b[1;35mValueError\x1b[0m: \x1b[35mboom\x1b[0m\n",
            "ValueError: boom",
        ),
        (
            f"{RAISED}ImportError: a harmless one\ntrain.py: error: unrecognized: --x\n",
            "train.py: error: unrecognized: --x",
        ),
        (
            f"{RAISED}ValueError: bad\nException ignored in: <f>\n{RAISED}TypeError: too late\n",
            "ValueError: bad",
        ),
        ("RuntimeError: " + "x" * 30_000, "RuntimeError: " + "x" * 486 + " ..."),
    ],
    ids=range(9),
)
def test_the_error_that_ended_it_is_reported(tmp_path: Path, log: str, expected: str) -> None:
    (tmp_path / "log").write_text(log)
    assert failure(tmp_path / "log") == expected
