"""Check, before any stage, that musubi-tuner's Python can import what the run needs.

musubi-tuner imports its optimizer, its attention code and its metrics writer hours after the run
began, or never: bitsandbytes, prodigyopt and schedulefree are not among its requirements, missing
attention code is noticed only at the first step, and without tensorboard accelerate drops the
metrics without a visible warning. torch.compile also fails only at the first step if Triton, or the
compiler that Triton uses, is missing.
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

# The probe's words for a module that is missing; torch is imported, so there Python reports it.
_NOT_THERE = "not there"
_NO_TORCH = "ModuleNotFoundError: No module named 'torch'"
_ATTENTION = {"flash": "flash_attn.flash_attn_interface", "xformers": "xformers.ops"}
# The pip packages of modules that have another name.
_PACKAGES = {"flash_attn": "flash-attn"}


@dataclass(frozen=True)
class RequiredModule:
    """A module that a run imports, the attribute it uses, and the option that requires it."""

    module: str
    why: str
    attribute: str = ""

    @property
    def package(self) -> str:
        """The pip package that provides it."""
        top = self.module.split(".")[0]
        return _PACKAGES.get(top, top)


def needs(config: RunConfig) -> list[RequiredModule]:
    """List what the training imports in addition to musubi-tuner's own requirements; pure."""
    # accelerate writes metrics through this, and silently continues without it.
    required = [RequiredModule("torch.utils.tensorboard", "MLflow's metrics need")]
    optimizer = config.optimizer.type
    why = f"optimizer={config.optimizer.name} needs"
    if optimizer.lower().endswith("8bit") and not optimizer.startswith("bitsandbytes."):
        required.append(RequiredModule("bitsandbytes", why))
    if optimizer.lower() == "adafactor":
        required.append(RequiredModule("transformers.optimization", why, "Adafactor"))
    elif "." in optimizer:
        module, _, attribute = optimizer.rpartition(".")
        required.append(RequiredModule(module, why, attribute))
    elif optimizer.lower() not in ("adamw", "adamw8bit"):
        required.append(RequiredModule("torch.optim", why, optimizer))
    attention = _ATTENTION.get(config.training.attention)
    if attention is not None:
        required.append(
            RequiredModule(attention, f"training.attention={config.training.attention} needs")
        )
    return required


def check_environment(
    config: RunConfig, command: Command, gpu: Gpu | None, *, trains: bool = True
) -> str:
    """Check that musubi-tuner's Python can import what the run needs.

    Args:
        config: the run's config.
        command: any command of the engine, for its interpreter and environment.
        gpu: the GPU, if there is one.
        trains: whether the run will train.

    Returns:
        The versions of its main packages.

    Raises:
        UserError: something is missing; the message has the pip command that fixes it.
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
            # The installer only checks that modules exist, so a module that exists but fails to
            # import needs --again.
            absent = any(why in (_NOT_THERE, _NO_TORCH) for why in core.values())
            remedy = f"Repair it with: {COMMAND}{'' if absent else ' --again'}"
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
    """Find the reason why torch.compile cannot work in the Python of ``command``.

    Returns:
        The reason and a remedy, or None if it can work.

    Raises:
        UserError: the Python cannot be started or gives no answer.
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


def _remedy(python: str) -> str:
    """Return the sentence that follows the error of a Python that does not start."""
    return f" Repair it with: {COMMAND}" if _is_ours(python) else ""


def _missing_modules_message(
    python: str, missing_modules: list[RequiredModule], missing: dict[str, str]
) -> str:
    reasons = [f"{need.why} {need.module} ({missing[need.module]})" for need in missing_modules]
    line = f"engine=musubi: {'; '.join(reasons)}."
    # musubi-tuner pins torch and transformers, so installing another version is no remedy.
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
    """Run a probe in a short process; the runs of a sweep share the cached answer."""
    try:
        done = subprocess.run(
            [python, "-c", text, request],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            env=dict(environment),
            # Not the user's folder, where Python would look for modules first.
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
            f"engine=musubi: {python} can't be started: {error.strerror}.{_remedy(python)}"
        ) from error
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"engine=musubi: {python} can't be asked what it has installed: {reason} (exit code "
            f"{done.returncode}).{_remedy(python)}"
        ) from error
