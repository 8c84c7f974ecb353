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
from runner.engines.base import Machine
from runner.engines.musubi.packages import COMMAND, MODULES, our_python

# Importing torch from a cold network disk takes a minute or two, not more.
TIMEOUT_SECONDS = 300.0

# What the probe says of a module that is not there; torch, which it imports, says it itself.
_NOT_THERE = "not there"
_NO_TORCH = "ModuleNotFoundError: No module named 'torch'"
_ATTENTION = {"flash": "flash_attn.flash_attn_interface", "xformers": "xformers.ops"}
# What pip calls a module, where that differs.
_PACKAGES = {"flash_attn": "flash-attn"}

_PROBE = """\
import importlib, importlib.metadata, importlib.util, json, sys
asked = json.loads(sys.argv[1])
answer = {"missing": {}, "versions": {}, "cuda": False}
for name in asked["find"]:
    if importlib.util.find_spec(name) is None:
        answer["missing"][name] = "not there"
for name, attribute in asked["import"]:
    try:
        module = importlib.import_module(name)
        if attribute and not hasattr(module, attribute):
            answer["missing"][name] = f"it has no {attribute}"
    except BaseException as error:
        answer["missing"][name] = " ".join(f"{type(error).__name__}: {error}".split())
for name in asked["versions"]:
    try:
        answer["versions"][name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
if "torch" not in answer["missing"]:
    import torch
    answer["cuda"] = torch.cuda.is_available()
print("\\n" + json.dumps(answer))
"""

# Triton builds a small module for each kernel as here, with the compiler that is chosen as here
# (triton/runtime/build.py, the same in 3.3, 3.5 and 3.7). On Windows it brings its own compiler.
_COMPILE_PROBE = """\
import importlib.metadata, importlib.util
import json, os, re, shutil, subprocess, sys, sysconfig, tempfile
lacks = None
if importlib.util.find_spec("triton") is None:
    # Each torch was built for one Triton, not for the newest.
    try:
        wanted = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    pins = [re.fullmatch(r"(triton)[ (]*([<>=!~][^;()]*)?[)]? *(;.*)?", line) for line in wanted]
    lacks = ["triton" + (pin[2] or "").strip() for pin in pins if pin][:1] or ["triton"]
elif sys.platform != "win32":
    compiler = os.environ.get("CC")
    if compiler is None:
        compiler = shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_paths(scheme=scheme)["include"]
    if compiler is None:
        lacks = "compiler"
    elif not os.path.isfile(os.path.join(headers, "Python.h")):
        lacks = "headers"
    else:
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w") as file:
                file.write("#include <Python.h>\\n")
            command = [compiler, source, "-shared", "-fPIC", "-o", source + ".so", "-I" + headers]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace")
                said, failed = done.stderr, done.returncode != 0
            except OSError as error:
                said, failed = error.strerror, True
        if failed:
            said = (said.strip().splitlines() or ["it failed"])[0]
            lacks = (compiler or "CC is empty") + ": " + said
print("\\n" + json.dumps(lacks))
"""


@dataclass(frozen=True)
class Need:
    """A module that a run imports, what of it is used, and the choice that asks for it."""

    module: str
    why: str
    attribute: str = ""

    @property
    def package(self) -> str:
        """What pip installs for it."""
        top = self.module.split(".")[0]
        return _PACKAGES.get(top, top)


def needs(config: RunConfig) -> list[Need]:
    """What the training of ``config`` imports beyond musubi-tuner's own requirements; pure."""
    # accelerate writes metrics through this, and goes on without them when it is missing.
    found = [Need("torch.utils.tensorboard", "MLflow's metrics need")]
    kind = config.optimizer.type
    why = f"optimizer={config.optimizer.name} needs"
    if kind.lower().endswith("8bit") and not kind.startswith("bitsandbytes."):
        found.append(Need("bitsandbytes", why))
    if kind.lower() == "adafactor":
        found.append(Need("transformers.optimization", why, "Adafactor"))
    elif "." in kind:
        module, _, attribute = kind.rpartition(".")
        found.append(Need(module, why, attribute))
    elif kind.lower() not in ("adamw", "adamw8bit"):
        found.append(Need("torch.optim", why, kind))
    attention = _ATTENTION.get(config.training.attention)
    if attention is not None:
        found.append(Need(attention, f"training.attention={config.training.attention} needs"))
    return found


def check_environment(
    config: RunConfig, command: Command, machine: Machine | None, *, trains: bool = True
) -> str:
    """Ask the Python of ``command`` for what the run will import; returns its main versions.

    ``command`` is any of the engine's, for its interpreter and environment, and ``trains`` is
    whether there is a training. Raises
    :class:`UserError`, one line with the pip command that mends it, for the first thing missing.
    """
    wanted = needs(config) if trains else []
    asked = {
        # Only torch is imported: importing them all would take half a minute.
        "find": [name for name in MODULES if name != "torch"],
        "import": [["torch", ""], *([need.module, need.attribute] for need in wanted)],
        "versions": ["torch", "accelerate", "transformers", "diffusers"],
    }
    python = command.argv[0]
    answer: dict[str, Any] = _ask(python, _PROBE, json.dumps(asked), command)
    missing: dict[str, str] = answer["missing"]
    core = {name: missing[name] for name in MODULES if name in missing}
    if core:
        told = "; ".join(f"{name}: {why}" for name, why in core.items())
        remedy = (
            "Install musubi-tuner's requirements there, or point engine.python to the Python that "
            "has them."
        )
        if _is_ours(python):
            # The installer looks for modules; one that is there and fails it takes for whole.
            gone = any(why in (_NOT_THERE, _NO_TORCH) for why in core.values())
            remedy = f"Mend it with: {COMMAND}{'' if gone else ' --again'}"
        raise UserError(f"engine=musubi: {python} can't run musubi-tuner ({told}). {remedy}")
    lacking = [need for need in wanted if need.module in missing]
    if lacking:
        raise UserError(_lacking(python, lacking, missing))
    if machine is not None and not answer["cuda"]:
        remedy = "Install a torch built for this driver's CUDA there."
        if _is_ours(python):
            remedy = f"Install the build for this driver with: {COMMAND} --again"
        raise UserError(
            f"engine=musubi: the driver shows {machine.name}, but torch "
            f"{answer['versions'].get('torch', '')} of {python} can't use it: that build has no "
            f"CUDA or needs a newer driver. {remedy}"
        )
    return ", ".join(f"{name} {version}" for name, version in answer["versions"].items())


def cannot_compile(command: Command) -> str | None:
    """Why torch.compile can't work in the Python of ``command``, and what to do; None if it can.

    Raises :class:`UserError` for a Python that can't be asked.
    """
    python = command.argv[0]
    lacks: str | list[str] | None = _ask(python, _COMPILE_PROBE, "", command)
    if isinstance(lacks, list):
        pip = f"{shlex.quote(python)} -m pip install {shlex.join(lacks)}"
        return f"{python} has no Triton (install it with: {pip})"
    if lacks == "compiler":
        return "there is no C compiler, with which Triton builds (apt install gcc, or set CC)"
    if lacks == "headers":
        return f"{python} has no Python.h, with which Triton builds (apt install python3-dev)"
    if lacks is not None:
        return f"the C compiler, with which Triton builds, can't build a Python module ({lacks})"
    return None


def _is_ours(python: str) -> bool:
    return Path(python) == our_python()


def _mended(python: str) -> str:
    """What follows the error of a Python that does not start."""
    return f" Mend it with: {COMMAND}" if _is_ours(python) else ""


def _lacking(python: str, lacking: list[Need], missing: dict[str, str]) -> str:
    reasons = [f"{need.why} {need.module} ({missing[need.module]})" for need in lacking]
    line = f"engine=musubi: {'; '.join(reasons)}."
    # torch and transformers are pinned with musubi-tuner: another release of them is no remedy.
    packages = {need.package for need in lacking if need.package != "transformers"}
    if "torch" in packages:
        packages.remove("torch")
        if any(need.module == "torch.utils.tensorboard" for need in lacking):
            packages.add("tensorboard")
        if any(need.module == "torch.optim" for need in lacking):
            line += " Take another optimizer, or a newer torch (Muon came with 2.9)."
    if packages:
        names = " ".join(shlex.quote(package) for package in sorted(packages))
        line += f" Install it with: {shlex.quote(python)} -m pip install {names}"
    return line


def _ask(python: str, program: str, asked: str, command: Command) -> Any:
    environment = tuple(sorted(command.environment(os.environ).items()))
    return _answer(python, program, asked, environment)


@cache
def _answer(python: str, program: str, asked: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """One short process; the runs of a sweep that ask the same share its answer."""
    try:
        done = subprocess.run(
            [python, "-c", program, asked],
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
