"""Runs in this process: the program's own preparing and carrying out, and the embedded engine.

Importing torch and diffusers takes far longer than a tiny training, so that many runs share it;
starting Python and importing Hydra takes longer than a dry run.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import Finished, compose

from runner.cli import main
from runner.config.composed import Composed
from runner.core import process
from runner.core.console import Console
from runner.core.process import SIGNALS
from runner.pipeline import executor


def executables_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of the runner's own modules are calls of these, in the run's folder."""
    start = process.run

    def run(
        argv: tuple[str, ...],
        *,
        cwd: Path,
        env: Mapping[str, str],
        log: Path,
        on_tick: Callable[[], None] | None = None,
        **others: Any,
    ) -> None:
        if argv[1] != "-m" or not argv[2].startswith("runner."):
            start(argv, cwd=cwd, env=env, log=log, on_tick=on_tick, **others)
            return
        module: Any = import_module(argv[2])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as said, redirect_stdout(said), redirect_stderr(said), chdir(cwd):
            module.main(list(argv[3:]))
        if on_tick is not None:
            on_tick()

    monkeypatch.setattr(process, "run", run)


def composed(*overrides: str) -> Composed:
    """What the command line makes of these overrides."""
    from omegaconf import OmegaConf

    config = compose(*overrides)
    resolved: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    return Composed(config, resolved, overrides, {})


def run_here(*overrides: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A whole run with these overrides, started in ``folder``; what it said."""
    # Pytest's own handlers stay.
    monkeypatch.setattr(executor, "raise_on_signals", lambda: None)
    out = io.StringIO()
    console = Console.for_stream(out)
    executor.execute(executor.prepare(composed(*overrides), console, folder), console, None)
    return out.getvalue()


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Set the signals' handlers back, which a run sets."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def program_here(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Finished:
    """What ``python -m runner`` says to these arguments, its command line read as the program does.

    For what it refuses or plans: ``env`` doesn't reach what read the environment when it was
    imported, such as the hub's client.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ),  # the program keeps passwords there
        handlers_kept(),
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        # What the program leaves behind for its one call of it.
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setattr(sys, "argv", ["runner"])
        code = main.run(list(arguments))
    return Finished(code, out.getvalue(), err.getvalue())
