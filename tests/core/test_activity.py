"""A command that does nothing any more is noticed, and one that does anything at all is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from runner.core import activity
from runner.core.activity import Stuck
from runner.core.errors import StageError
from runner.core.process import run

SECONDS = 1.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def watched(code: str, folder: Path, stuck: Stuck) -> Path:
    """Run Python under watch; returns its log."""
    log, work = folder / "logs" / "stage.log", folder / "work"
    work.mkdir(exist_ok=True)
    command = (sys.executable, "-S", "-c", code)
    run(command, cwd=work, env=dict(os.environ), log=log, stuck=stuck)
    return log


# A command that only waits is told of, again when the time has doubled, and goes on to its end.
def test_a_stuck_command_is_told_of(tmp_path: Path) -> None:
    told: list[float] = []
    code = f"import time; print('begun', flush=True); time.sleep({7 * SECONDS}); print('ended')"
    log = watched(code, tmp_path, Stuck(told.append, say_after=SECONDS))
    assert log.read_text().split() == ["begun", "ended"]
    assert 2 <= len(told) <= 3
    assert told[0] >= SECONDS and told[1] >= 2 * told[0]


# Only where that was asked for is it ended; the line has its log's last line and place.
def test_a_stuck_command_is_ended(tmp_path: Path) -> None:
    code = "import time; print('first\\nlast words', flush=True); time.sleep(600)"
    with pytest.raises(StageError) as caught:
        watched(code, tmp_path, Stuck(lambda _: None, end_after=SECONDS))
    log = tmp_path / "logs" / "stage.log"
    said = "without any progress; the last line of its log is: last words"
    assert str(caught.value).startswith("it was ended after 1 second")
    assert str(caught.value).endswith(f"{said} (log: {log})")


BUSY = "end = time.monotonic() + 4\nwhile time.monotonic() < end: pass\n"
QUIET = "for number in range(16): time.sleep(0.25); "


def in_a_child(code: str) -> str:
    return f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {code!r}])"


# Whatever a command does keeps it from being called stuck or ended: computing in silence, itself at
# the lowest priority or in a process of a process, a line of output, or a file that it changes.
@pytest.mark.parametrize(
    "code",
    [
        f"os.nice(19)\n{BUSY}",
        in_a_child(in_a_child(f"import time\n{BUSY}")),
        f"{QUIET}print(number, flush=True)",
        f"{QUIET}open('made', 'w').close()",
    ],
    ids=["computes", "grandchild", "prints", "writes"],
)
def test_a_command_that_works_is_left_alone(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In two seconds, the hundredth of one that a line of output takes would be work.
    monkeypatch.setattr(activity, "_IDLE_SHARE", 0.1)
    told: list[float] = []
    stuck = Stuck(told.append, end_after=2 * SECONDS, say_after=2 * SECONDS)
    watched(f"import os, time\n{code}", tmp_path, stuck)
    assert not told


# The processor time of all processes of a command counts, of those that have ended and of those in
# groups of their own too, and of nobody else's; one that waits is not taken to run.
def test_processor_time_of_a_command(tmp_path: Path) -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = f"import subprocess, sys, time\n{in_a_child(in_a_child(work))}\n{work}"
    code += f"sleeper = {(work + 'time.sleep(600)')!r}\n"
    code += "subprocess.Popen([sys.executable, '-S', '-c', sleeper], process_group=0)\n"
    code += "time.sleep(600)"
    command = [sys.executable, "-S", "-c", code]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        used = activity.Used()
        # Two in one process each, and one in a child that has ended.
        while (used.seconds < 0.8 or used.waiting_for_processor) and time.monotonic() < deadline:
            time.sleep(0.1)
            used = activity._used(process.pid) or used
        assert 0.8 <= used.seconds < 5 and not used.waiting_for_processor
        assert activity._used(process.pid + 1_000_000) is None
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()
