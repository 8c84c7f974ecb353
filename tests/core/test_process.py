"""Commands run in their own group, end with the run, and fail with their own last word."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import TOP

from runner.core import process
from runner.core.command import Command
from runner.core.errors import StageError
from runner.core.process import (
    SIGNALS,
    Stopped,
    last_error,
    raise_on_signals,
    run,
    signals_deferred,
)


def python(code: str, log: Path, on_tick: Callable[[], None] | None = None) -> None:
    run(
        (sys.executable, "-c", code),
        cwd=log.parent,
        env=dict(os.environ),
        log=log,
        on_tick=on_tick,
    )


def kill(log: Path) -> None:
    """End what a failed test has left: the process whose number its log begins with."""
    words = log.read_text().split() if log.exists() else []
    if words and psutil.pid_exists(int(words[0])):
        psutil.Process(int(words[0])).kill()


# What a command prints, on either stream, is in its log.
def test_output_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    python("import sys; print('out'); print('err', file=sys.stderr)", log)
    assert sorted(log.read_text().split()) == ["err", "out"]


# The commands of a stage share its log: each goes on after what the one before it said.
def test_a_log_is_gone_on_with(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    python("print('first')", log)
    python("print('second')", log)
    assert log.read_text().split() == ["first", "second"]


# A failing command is reported by its own last error, its exit code and its log.
def test_failure_names_the_last_error(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    with pytest.raises(StageError) as caught:
        python("print('step 1'); raise RuntimeError('CUDA out of memory')", log)
    assert str(caught.value) == f"RuntimeError: CUDA out of memory (exit code 1; log: {log})"


# A command that the disk has no space for says so in plain words, whatever its traceback says.
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    with pytest.raises(StageError) as caught:
        python("open('/dev/full', 'w').write('x' * 100_000)", log)
    where = f"(exit code 1; log: {log})"
    assert str(caught.value) == f"the disk is full: free some space {where}"


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
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    log, living = tmp_path / "log", tmp_path / "living"
    # While one of them lives, this end of the pipe reads nothing; when the last has died, its end.
    os.mkfifo(living)
    pipe = os.open(living, os.O_RDONLY | os.O_NONBLOCK)
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"held = os.open({str(living)!r}, os.O_WRONLY)\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print(subprocess.Popen(sleep, pass_fds=[held]).pid, flush=True)\n"
        "time.sleep(600)\n"
        "print('ended by itself', flush=True)\n"
    )

    def stop_when_started() -> None:
        if log.exists() and log.read_text().strip():
            raise Stopped(15)

    try:
        with pytest.raises(Stopped) as caught:
            python(code, log, stop_when_started)
        assert caught.value.exit_code == 143
        assert "by itself" not in log.read_text()
        # Killed is not yet gone; the limit is for a test that fails.
        assert select.select([pipe], [], [], 60)[0]
        assert os.read(pipe, 1) == b""
    finally:
        os.close(pipe)
        kill(log)


# A command is asked before it is killed: what it does at its end, as writing its state, it can do.
def test_a_command_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 300.0)
    log = tmp_path / "log"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    print('ended in good order', flush=True)\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )

    def stop_when_started() -> None:
        if log.read_text().strip():
            raise Stopped(15)

    with pytest.raises(Stopped):
        python(code, log, stop_when_started)
    assert log.read_text().splitlines() == ["started", "ended in good order"]


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


# A command that the system killed is reported by the signal's name, not by a negative number.
def test_a_killed_command_is_reported_as_such(tmp_path: Path) -> None:
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
    log = tmp_path / "log"
    asked: list[float] = []

    def now() -> float:
        """A clock by which the command's time is over when it has sent the second signal."""
        asked.append(1e9 if asked and "asked" in log.read_text() else 0.0)
        return asked[-1]

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    # What it was asked comes after it has sent the second signal, so that both were there.
    code = (
        "import os, signal, time\n"
        "def end(*_):\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    print('asked', flush=True)\n"
        "signal.signal(signal.SIGTERM, end)\n"
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
    log = tmp_path / "log"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from runner.core.process import run\n"
        "command = (sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); "
        "time.sleep(600)')\n"
        "run(command, cwd=Path('.'), env=dict(os.environ), log=Path(sys.argv[1]))\n"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code, str(log)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    try:
        while runner.poll() is None and not (log.exists() and log.read_text().strip()):
            time.sleep(0.05)
        child = psutil.Process(int(log.read_text()))
        runner.kill()
        runner.wait()
        child.wait(timeout=60)
        assert not child.is_running()
    finally:
        runner.kill()
        kill(log)


# A run that a signal ends is ended by that one, whatever comes while it is being ended.
def test_the_first_signal_stands() -> None:
    with pytest.raises(Stopped) as caught:
        try:
            raise Stopped(signal.SIGINT)
        except Stopped:
            with signals_deferred():
                os.kill(os.getpid(), signal.SIGTERM)
            raise
    assert caught.value.number == signal.SIGINT
