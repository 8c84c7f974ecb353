"""Commands run in their own group, end with the run, and fail with their own last word."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from runner import process
from runner.commands import Command
from runner.errors import StageError
from runner.process import SIGNALS, Stopped, last_error, raise_on_signals, run


def python(code: str, log: Path, on_tick: Callable[[], None] | None = None) -> None:
    run(
        (sys.executable, "-c", code),
        cwd=log.parent,
        env=dict(os.environ),
        log=log,
        on_tick=on_tick,
    )


# What a command prints, on either stream, is in its log.
def test_output_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    python("import sys; print('out'); print('err', file=sys.stderr)", log)
    assert sorted(log.read_text().split()) == ["err", "out"]


# A failing command is told by its own last error, its exit code and its log.
def test_failure_names_the_last_error(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    with pytest.raises(StageError) as caught:
        python("print('step 1'); raise RuntimeError('CUDA out of memory')", log)
    assert str(caught.value) == f"RuntimeError: CUDA out of memory (exit code 1; log: {log})"


# The last error is found behind progress bars and clean-up chatter.
def test_last_error_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "steps: 1%\rsteps: 2%\n"
        "Traceback (most recent call last):\n  File x\n"
        "torch.OutOfMemoryError: CUDA out of memory.\n"
        "steps: 3%\rsteps: 4%\n"
    )
    assert last_error(log) == "torch.OutOfMemoryError: CUDA out of memory."
    log.write_text("just\nwords\n")
    assert last_error(log) == "words"


# A command that does not exist is a clear failure, not a traceback.
def test_missing_program(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="could not be started"):
        run(("no-such-program",), cwd=tmp_path, env={}, log=tmp_path / "log")


# When the run is stopped, the command and all it started are gone, even what ignores SIGTERM.
def test_stopping_ends_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.process.GRACE_SECONDS", 0.5)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"

    def stop_when_started() -> None:
        if log.exists() and log.read_text().strip():
            raise Stopped(15)

    began = time.monotonic()
    with pytest.raises(Stopped) as caught:
        python(code, log, stop_when_started)
    assert caught.value.exit_code == 143
    assert time.monotonic() - began < 60
    child = int(log.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        assert not psutil.pid_exists(child)


# A command's environment is the runner's with what it names taken out and put in.
def test_environment() -> None:
    command = Command(("x",), set_env=(("PYTHONPATH", "/src"),), unset_env=("PYTHONHOME",))
    base = {"PYTHONHOME": "h", "HOME": "/root"}
    assert command.environment(base) == {"HOME": "/root", "PYTHONPATH": "/src"}


# What is printed for a person to run is what is run, whatever is in the arguments.
def test_shell_quotes() -> None:
    import shlex

    argv = ("prog", "-m", "mod", "--path", "it's a [b] $x", "--long", "y" * 90)
    assert shlex.split(Command(argv).shell().replace("\\\n", " ")) == list(argv)


# Signals inside a deferred part wait for its end, and are not lost.
def test_signals_wait_for_a_deferred_part() -> None:
    import signal

    from runner.process import raise_on_signals, signals_deferred

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    raise_on_signals()
    done: list[str] = []
    try:
        with pytest.raises(Stopped) as caught, signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            done.append("all of it")
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert done == ["all of it"]
    assert caught.value.exit_code == 143


LAUNCHER = (
    "Traceback (most recent call last):\n"
    '  File "/venv/lib/accelerate/commands/launch.py", line 5, in simple_launcher\n'
    "    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=cmd)\n"
    "subprocess.CalledProcessError: Command '['/venv/bin/python', '-m', 'musubi.train']' {}.\n"
)


# accelerate's launcher ends every failure with its own traceback: the trainer's error is told.
@pytest.mark.parametrize(
    ("said", "how", "told"),
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
def test_the_trainers_own_error_is_told(tmp_path: Path, said: str, how: str, told: str) -> None:
    log = tmp_path / "log"
    log.write_text(said + LAUNCHER.format(how))
    assert last_error(log) == told


WARNING = (
    "/usr/lib/python3.10/multiprocessing/resource_tracker.py:224: UserWarning: resource_tracker: "
    "There appear to be 1 leaked semaphore objects to clean up at shutdown\n"
    "  warnings.warn('resource_tracker: x')\n"
)
RAISED = "Traceback (most recent call last):\n  File x\n    f()\n"
FAILED = "returned non-zero exit status 1"


# The error told is the one that ended the trainer, short and without colours, whatever its name
# and however much is printed before it, in it or after it.
@pytest.mark.parametrize(
    ("log", "told"),
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
def test_the_error_that_ended_it_is_told(tmp_path: Path, log: str, told: str) -> None:
    (tmp_path / "log").write_text(log)
    assert last_error(tmp_path / "log") == told


# A command that the system killed is told by the signal's name, not by a negative number.
def test_a_killed_command_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="ended by SIGKILL, as the system does when memory"):
        python("import os; os.kill(os.getpid(), 9)", tmp_path / "stage.log")


@contextmanager
def ended_at_last(log: Path) -> Iterator[None]:
    """Leave no command behind whose number is the first line of its log, nor a signal's handler."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for line in log.read_text().splitlines()[:1] if log.exists() else ():
            with suppress(ProcessLookupError):
                os.killpg(int(line), signal.SIGKILL)


# A second signal while a command is being ended does not leave it running.
def test_a_second_signal_does_not_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    log = tmp_path / "log"
    # What it was asked comes after it has sent the second signal, so that both were there.
    code = (
        "import os, signal, time\n"
        "def asked(*_):\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    print('asked', flush=True)\n"
        "signal.signal(signal.SIGTERM, asked)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(30)\n"
        "print('ended by itself', flush=True)\n"
    )

    def stop_when_started() -> None:
        if log.exists() and log.read_text().strip():
            os.kill(os.getpid(), signal.SIGTERM)

    with ended_at_last(log):
        raise_on_signals()
        with pytest.raises(Stopped):
            python(code, log, stop_when_started)
        number, *said = log.read_text().split()
        assert said == ["asked"]
        assert not psutil.pid_exists(int(number))


# When the runner is killed outright, the command it was running ends too.
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to do it")
def test_a_killed_runner_takes_its_command_along(tmp_path: Path) -> None:
    import subprocess

    from conftest import TOP

    log = tmp_path / "log"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from runner.process import run\n"
        "command = (sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); "
        "time.sleep(600)')\n"
        "run(command, cwd=Path('.'), env=dict(os.environ), log=Path(sys.argv[1]))\n"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code, str(log)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (log.exists() and log.read_text().strip()):
        time.sleep(0.05)
    child = psutil.Process(int(log.read_text()))
    runner.kill()
    runner.wait()
    child.wait(timeout=10)
