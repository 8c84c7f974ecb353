"""Whether an optimizer that no rule knows can be made and used; asked before any stage."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from runner.config.schema import OptimizerConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.core.process import best_line
from runner.engines.optimizer_classes import ARGUMENTS, class_path

# What the runner itself requires, and so what is always there.
_INSTALLED = ("torch", "transformers", "prodigyopt", "schedulefree")
TIMEOUT_SECONDS = 300.0


def is_certain(optimizer: OptimizerConfig) -> bool:
    """Whether the rules have said all there is to say of it."""
    path = class_path(optimizer.type)
    return path in ARGUMENTS and path.partition(".")[0] in _INSTALLED


@cache
def check_optimizer(command: Command) -> None:
    """Try an optimizer out with :mod:`runner.engines.diffusers.try_optimizer`.

    In a process of its own, because importing torch and a stranger's class is not for this one. The
    runs of a sweep that have the same share its answer.

    Raises:
        UserError: it can't be imported, refuses its arguments or fails in its first step.
    """
    try:
        done = subprocess.run(
            command.argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            env=command.environment(os.environ),
            # Like the run's folder, one in which Python finds no module.
            cwd=Path(command.argv[0]).anchor or None,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"engine=diffusers: the optimizer took more than {TIMEOUT_SECONDS:.0f} seconds to try."
        ) from None
    if done.returncode:
        line = best_line([line for line in done.stderr.splitlines() if line.strip()])
        said = line.removeprefix("error: train.toml: ")
        raise UserError(f"engine=diffusers: {said.replace('optimizer_type=', 'optimizer.type=')}")
