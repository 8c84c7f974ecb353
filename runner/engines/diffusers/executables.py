"""Commands that run this package's executables; pure."""

from __future__ import annotations

from runner.core.command import Command

_PACKAGE = "runner.engines.diffusers"


def module_command(python: str, source_path: str | None, name: str, *arguments: str) -> Command:
    """One of this package's executables."""
    # One thread is as fast at this size, much faster when the machine is busy, and gives the
    # same sums on machines with different numbers of cores.
    environment = [("OMP_NUM_THREADS", "1")]
    # The run's folder is the working folder, so Python must be told where the runner is when
    # it is used from a checkout that is not installed.
    if source_path:
        environment.append(("PYTHONPATH", source_path))
    return Command((python, "-m", f"{_PACKAGE}.{name}", *arguments), set_env=tuple(environment))
