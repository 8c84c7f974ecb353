"""Check, before any stage, that an optimizer which the rules do not know can be used."""

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

# Packages that the runner itself requires, so they are always installed.
_INSTALLED = ("torch", "transformers", "prodigyopt", "schedulefree")
TIMEOUT_SECONDS = 300.0


def is_certain(optimizer: OptimizerConfig) -> bool:
    """Return whether the rules have already checked the optimizer completely."""
    path = class_path(optimizer.type)
    return path in ARGUMENTS and path.partition(".")[0] in _INSTALLED


@cache
def check_optimizer(command: Command) -> None:
    """Try an optimizer with :mod:`runner.engines.diffusers.try_optimizer`.

    It runs in another process, because this one should import neither torch nor unknown code. The
    runs of a sweep share the cached answer.

    Raises:
        UserError: it can't be imported, rejects its arguments or fails in its first step.
    """
    try:
        done = subprocess.run(
            command.argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            env=command.environment(os.environ),
            # A folder without Python modules, like the run's folder.
            cwd=Path(command.argv[0]).anchor or None,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"engine=diffusers: the optimizer took more than {TIMEOUT_SECONDS:.0f} seconds to try."
        ) from None
    if done.returncode:
        line = best_line([line for line in done.stderr.splitlines() if line.strip()])
        reason = line.removeprefix("error: train.toml: ")
        raise UserError(f"engine=diffusers: {reason.replace('optimizer_type=', 'optimizer.type=')}")
