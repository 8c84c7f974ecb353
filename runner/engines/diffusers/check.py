"""Check, before any stage, that torch can use the GPU, and that the optimizer can be used."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from runner.config.schema import OptimizerConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.core.paths import checkout, shortest
from runner.core.process import best_line
from runner.engines.base import Gpu
from runner.engines.optimizer_classes import ARGUMENTS, class_path
from runner.engines.torch_builds import (
    BUILDS,
    INDEX,
    builds_of,
    chosen_build,
    no_build,
    read_driver,
    runs,
)

_ON_THE_CPU = "With CUDA_VISIBLE_DEVICES= model=tiny trains on the CPU."
# Packages that the runner itself requires, so they are always installed.
_INSTALLED = ("torch", "transformers", "prodigyopt", "schedulefree")
TIMEOUT_SECONDS = 300.0


def torch_problem(gpu: Gpu) -> str | None:
    """Return why the installed torch can't use the GPU, with a remedy, or None.

    The trainer would silently compute on the CPU.
    """
    driver = read_driver()
    if driver is None:
        return None
    driver = replace(driver, capabilities=(gpu.capability,))
    torch, cuda = version("torch"), _torch_cuda()
    if cuda is not None and runs(f"cu{cuda.replace('.', '')}", driver):
        return None
    line = f"torch {torch} ({f'CUDA {cuda}' if cuda else 'no CUDA'}) can't use {gpu.name}"
    release = torch.partition("+")[0]
    offered = builds_of(release)
    build = chosen_build(driver, offered)
    if build is not None:
        install = f"--index-url {INDEX}/{build} torch=={release}+{build}"
        return f"{line} with {driver}: {_setup(install)}. {_ON_THE_CPU}"
    other = ", or take engine=musubi" if chosen_build(driver, BUILDS) else ""
    return f"{line}: {no_build(driver, f'torch {release}', offered)}{other}. {_ON_THE_CPU}"


def missing_optimizer(optimizer: OptimizerConfig) -> str | None:
    """Return what to do if the optimizer needs bitsandbytes and it is not installed, or None."""
    path = class_path(optimizer.type)
    if not path.startswith("bitsandbytes.") and not path.lower().endswith("8bit"):
        return None
    if find_spec("bitsandbytes"):
        return None
    return (
        f"optimizer={optimizer.name} needs bitsandbytes, which is not installed: "
        f"{_setup(shlex.quote('hunyuan-lora-runner[gpu]'))}, or take optimizer=adamw."
    )


def _torch_cuda() -> str | None:
    """Read the CUDA version of the installed torch, which takes seconds to import."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    cuda = re.search(r"""^cuda\b.*=\s*['"]([\d.]+)['"]""", text, re.MULTILINE)
    return cuda[1] if cuda else None


def _setup(packages: str) -> str:
    """Return the command that repairs this Python: set-up, or pip where that did not make it."""
    top = checkout()
    if top and Path(sys.prefix) == Path(top, ".venv"):
        return f"run {shortest(Path(top, 'scripts', 'setup'))}"
    return f"run {shlex.quote(sys.executable)} -m pip install {packages}"


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
