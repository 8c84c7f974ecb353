"""The checkpoints of a run: what they are named, and their conversion while the trainer runs."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from runner.core.command import Command
from runner.core.errors import UserError, describe_os_error
from runner.core.process import end_group, log_lines, signals_deferred
from runner.formats.safetensors_header import read_header
from runner.pipeline.run_folders import run_label

CHECKPOINTS = "checkpoints"
COMFYUI = "checkpoints/comfyui"
# Both trainers' names: lora-000003 after an epoch, lora-step00000500 after a step, lora at the end.
_NAME = re.compile(r"lora(?:-(step)?(\d{6,}))?\.safetensors")
# Seconds between two looks at the folder. A file that did not change meanwhile has been written.
_INTERVAL = 2.0

Kind = Literal["epoch", "step", "last"]
# Size and time of change.
_Signature = tuple[int, int]


def parse_name(name: str) -> tuple[Kind, int] | None:
    """Read when a LoRA was saved from its name: after which epoch or step; None for other files."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if match[2] is None:
        return "last", 0
    return ("step" if match[1] else "epoch"), int(match[2])


def converted_name(run: Path, name: str) -> str:
    """Name the file that is made of a checkpoint: by its run, so that copies don't meet.

    Args:
        run: the run's folder.
        name: the checkpoint's name.

    Returns:
        ``<run>-epoch000003``, ``<run>-step000500``, or ``<run>`` for the last one.
    """
    kind, number = parse_name(name) or ("last", 0)
    return run_label(run) if kind == "last" else f"{run_label(run)}-{kind}{number:06d}"


class CheckpointConversion:
    """Gives each checkpoint of a run its file for ComfyUI, beside a trainer that goes on.

    A process of the lowest priority converts; this one looks at the folder now and then, and waits.
    What the trainer deletes is deleted here too.
    """

    def __init__(self, run: Path, python: str, python_path: str | None) -> None:
        """Prepare it; nothing is done before :meth:`tick`.

        Args:
            run: the run's folder.
            python: the runner's Python.
            python_path: what it needs on PYTHONPATH.
        """
        self._run = run
        self._log = run / "logs" / "checkpoints.log"
        set_env = {"OMP_NUM_THREADS": "1", **({"PYTHONPATH": python_path} if python_path else {})}
        self._command = Command(
            (python, "-m", "runner.stages.convert", "--background", "--run", "."),
            set_env=tuple(set_env.items()),
        )
        self._next = 0.0
        self._seen: dict[str, _Signature] = {}
        self._done: dict[str, _Signature] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._converting: list[str] = []
        self._problems: list[str] = []

    def tick(self) -> None:
        """Start what can be converted; returns at once, and never fails."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _INTERVAL
            with self._tolerant():
                self._look()

    def _look(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._collect()
        found = self._found()
        same = {name for name, signature in found.items() if self._seen.get(name) == signature}
        self._seen = found
        self._prune(found)
        self._start({name: found[name] for name in same})

    def finish(self, *, with_last: bool) -> list[str]:
        """Convert what is left, after the trainer's end.

        Args:
            with_last: whether the finished LoRA is converted too.

        Returns:
            What could not be converted and why, one line each.
        """
        try:
            with self._tolerant():
                self._wait()
                found = self._found(with_last=with_last)
                self._prune(found)
                self._start(found)
                for name in found.keys() - self._done.keys():
                    self._note(f"{CHECKPOINTS}/{name} was cut, and is not converted for ComfyUI")
                self._wait()
        except BaseException:
            # A second signal: nothing may go on writing after the run's end.
            with signals_deferred():
                if self._process is not None:
                    end_group(self._process)
            raise
        return self._problems

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Note what the system refuses: it must not end the training."""
        try:
            yield
        except OSError as error:
            self._note(f"checkpoints were not converted for ComfyUI: {describe_os_error(error)}")

    def _note(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.append(problem)

    def _checkpoint(self, name: str) -> Path:
        return self._run / CHECKPOINTS / name

    def _converted(self, name: str) -> Path:
        return self._run / COMFYUI / f"{converted_name(self._run, name)}.safetensors"

    def _found(self, *, with_last: bool = False) -> dict[str, _Signature]:
        found: dict[str, _Signature] = {}
        try:
            with os.scandir(self._run / CHECKPOINTS) as entries:
                for entry in entries:
                    parsed = parse_name(entry.name)
                    if parsed and (parsed[0] != "last" or with_last):
                        stat = entry.stat()
                        found[entry.name] = stat.st_size, stat.st_mtime_ns
        except FileNotFoundError:
            pass
        return found

    def _prune(self, found: dict[str, _Signature]) -> None:
        for name in [name for name in self._done if name not in found]:
            self._converted(name).unlink(missing_ok=True)
            del self._done[name]

    def _start(self, found: dict[str, _Signature]) -> None:
        todo = sorted(
            name
            for name, signature in found.items()
            if self._done.get(name) != signature and is_complete(self._checkpoint(name))
        )
        if not todo:
            return
        self._done |= {name: found[name] for name in todo}
        pairs: list[str] = []
        for name in todo:
            self._converted(name).unlink(missing_ok=True)
            pairs += [
                str(path.relative_to(self._run))
                for path in (self._checkpoint(name), self._converted(name))
            ]
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                (*self._command.argv, *pairs),
                cwd=self._run,
                env=self._command.environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._converting = todo

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._collect()

    def _collect(self) -> None:
        """Note what the ended process did not convert, unless the trainer has deleted it since."""
        self._process = None
        for name in self._converting:
            if not self._converted(name).is_file() and self._checkpoint(name).is_file():
                errors = [line for line in log_lines(self._log) or [] if name in line]
                why = (errors or ["see its log"])[-1].removeprefix("error: ")
                self._note(
                    f"{CHECKPOINTS}/{name} was not converted for ComfyUI: {why} (log: {self._log})"
                )
        self._converting = []


def is_complete(file: Path) -> bool:
    """Return whether a safetensors file has all bytes that its header says."""
    try:
        tensors = read_header(file).values()
        return max((tensor.end for tensor in tensors), default=0) == file.stat().st_size
    except (UserError, OSError):
        return False
