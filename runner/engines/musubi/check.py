"""Whether musubi-tuner's own Python has what a run will import from it; asked before any stage.

musubi-tuner imports its optimizer, its attention code and its metrics writer hours after the run
began, or never: bitsandbytes, prodigyopt and schedulefree are not among its requirements, missing
attention code is first noticed at the first step, and without tensorboard accelerate drops the
metrics with no warning that shows. torch.compile fails at the first step too, where Triton or what
it builds with is missing.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runner.config.schema import RunConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.engines.base import Gpu
from runner.engines.musubi.packages import COMMAND, MODULES, our_python
from runner.engines.musubi.probes import program

# Importing torch from a cold network disk takes a minute or two, not more.
TIMEOUT_SECONDS = 300.0

# What the probe says of a module that is not there; torch, which it imports, says it itself.
_NOT_THERE = "not there"
_NO_TORCH = "ModuleNotFoundError: No module named 'torch'"
_ATTENTION = {"flash": "flash_attn.flash_attn_interface", "xformers": "xformers.ops"}
# What pip calls a module, where that differs.
_PACKAGES = {"flash_attn": "flash-attn"}


@dataclass(frozen=True)
class RequiredModule:
    """A module that a run imports, what of it is used, and the choice that asks for it."""

    module: str
    why: str
    attribute: str = ""

    @property
    def package(self) -> str:
        """What pip installs for it."""
        top = self.module.split(".")[0]
        return _PACKAGES.get(top, top)


def needs(config: RunConfig) -> list[RequiredModule]:
    """What the training of ``config`` imports beyond musubi-tuner's own requirements; pure."""
    # accelerate writes metrics through this, and goes on without them when it is missing.
    found = [RequiredModule("torch.utils.tensorboard", "MLflow's metrics need")]
    kind = config.optimizer.type
    why = f"optimizer={config.optimizer.name} needs"
    if kind.lower().endswith("8bit") and not kind.startswith("bitsandbytes."):
        found.append(RequiredModule("bitsandbytes", why))
    if kind.lower() == "adafactor":
        found.append(RequiredModule("transformers.optimization", why, "Adafactor"))
    elif "." in kind:
        module, _, attribute = kind.rpartition(".")
        found.append(RequiredModule(module, why, attribute))
    elif kind.lower() not in ("adamw", "adamw8bit"):
        found.append(RequiredModule("torch.optim", why, kind))
    attention = _ATTENTION.get(config.training.attention)
    if attention is not None:
        found.append(
            RequiredModule(attention, f"training.attention={config.training.attention} needs")
        )
    return found


def check_environment(
    config: RunConfig, command: Command, gpu: Gpu | None, *, trains: bool = True
) -> str:
    """Ask the Python of ``command`` for what the run will import; returns its main versions.

    ``command`` is any of the engine's, for its interpreter and environment, and ``trains`` is
    whether there is a training. Raises
    :class:`UserError`, one line with the pip command that mends it, for the first thing missing.
    """
    wanted = needs(config) if trains else []
    request = {
        # Only torch is imported: importing them all would take half a minute.
        "find": [name for name in MODULES if name != "torch"],
        "import": [["torch", ""], *([need.module, need.attribute] for need in wanted)],
        "versions": ["torch", "accelerate", "transformers", "diffusers"],
    }
    python = command.argv[0]
    answer: dict[str, Any] = _ask(python, "modules", json.dumps(request), command)
    missing: dict[str, str] = answer["missing"]
    core = {name: missing[name] for name in MODULES if name in missing}
    if core:
        problems = "; ".join(f"{name}: {why}" for name, why in core.items())
        remedy = (
            "Install musubi-tuner's requirements there, or point engine.python to the Python that "
            "has them."
        )
        if _is_ours(python):
            # The installer looks for modules; one that is there and fails it takes for whole.
            gone = any(why in (_NOT_THERE, _NO_TORCH) for why in core.values())
            remedy = f"Mend it with: {COMMAND}{'' if gone else ' --again'}"
        raise UserError(f"engine=musubi: {python} can't run musubi-tuner ({problems}). {remedy}")
    missing_modules = [need for need in wanted if need.module in missing]
    if missing_modules:
        raise UserError(_missing_modules_message(python, missing_modules, missing))
    if gpu is not None and not answer["cuda"]:
        remedy = "Install a torch built for this driver's CUDA there."
        if _is_ours(python):
            remedy = f"Install the build for this driver with: {COMMAND} --again"
        raise UserError(
            f"engine=musubi: the driver shows {gpu.name}, but torch "
            f"{answer['versions'].get('torch', '')} of {python} can't use it: that build has no "
            f"CUDA or needs a newer driver. {remedy}"
        )
    return ", ".join(f"{name} {version}" for name, version in answer["versions"].items())


def cannot_compile(command: Command) -> str | None:
    """Why torch.compile can't work in the Python of ``command``, and what to do; None if it can.

    Raises :class:`UserError` for a Python that can't be asked.
    """
    python = command.argv[0]
    compile_problem: str | list[str] | None = _ask(python, "compiling", "", command)
    if isinstance(compile_problem, list):
        pip = f"{shlex.quote(python)} -m pip install {shlex.join(compile_problem)}"
        return f"{python} has no Triton (install it with: {pip})"
    if compile_problem == "compiler":
        return "there is no C compiler, with which Triton builds (apt install gcc, or set CC)"
    if compile_problem == "headers":
        return f"{python} has no Python.h, with which Triton builds (apt install python3-dev)"
    if compile_problem is not None:
        return (
            "the C compiler, with which Triton builds, can't build a Python module "
            f"({compile_problem})"
        )
    return None


def _is_ours(python: str) -> bool:
    return Path(python) == our_python()


def _mended(python: str) -> str:
    """What follows the error of a Python that does not start."""
    return f" Mend it with: {COMMAND}" if _is_ours(python) else ""


def _missing_modules_message(
    python: str, missing_modules: list[RequiredModule], missing: dict[str, str]
) -> str:
    reasons = [f"{need.why} {need.module} ({missing[need.module]})" for need in missing_modules]
    line = f"engine=musubi: {'; '.join(reasons)}."
    # torch and transformers are pinned with musubi-tuner: another release of them is no remedy.
    packages = {need.package for need in missing_modules if need.package != "transformers"}
    if "torch" in packages:
        packages.remove("torch")
        if any(need.module == "torch.utils.tensorboard" for need in missing_modules):
            packages.add("tensorboard")
        if any(need.module == "torch.optim" for need in missing_modules):
            line += " Take another optimizer, or a newer torch (Muon came with 2.9)."
    if packages:
        names = " ".join(shlex.quote(package) for package in sorted(packages))
        line += f" Install it with: {shlex.quote(python)} -m pip install {names}"
    return line


def _ask(python: str, probe: str, request: str, command: Command) -> Any:
    environment = tuple(sorted(command.environment(os.environ).items()))
    return _answer(python, program(probe), request, environment)


@cache
def _answer(python: str, text: str, request: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """One short process; the runs of a sweep that ask the same share its answer."""
    try:
        done = subprocess.run(
            [python, "-c", text, request],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            env=dict(environment),
            # Not the user's folder, which Python would search before its own packages.
            cwd=Path(python).anchor or None,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"engine=musubi: {python} did not answer within {TIMEOUT_SECONDS:.0f} seconds when "
            "asked what it has installed."
        ) from error
    except OSError as error:
        raise UserError(
            f"engine=musubi: {python} can't be started: {error.strerror}.{_mended(python)}"
        ) from error
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"engine=musubi: {python} can't be asked what it has installed: {said} (exit code "
            f"{done.returncode}).{_mended(python)}"
        ) from error
