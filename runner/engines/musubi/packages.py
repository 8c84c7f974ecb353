"""Which packages make musubi-tuner's environment, and the commands that install them; pure, but
for the place, which the environment may name.

The image installs it with this module and few others (docker/Dockerfile), so that a change of the
rest does not install it again.

The packages beside torch were tested together with musubi-tuner v0.3.4 on the CPU; the torch
builds for CUDA are those it asks for and could not be installed where this was written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.errors import UserError
from runner.core.paths import shortest

VERSION = "v0.3.4"
# A checkout's script makes the runner's own environment too, where that is not there yet.
_SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "install-musubi"
_MODULE = "python -m runner.engines.musubi_install install"
COMMAND = shortest(_SCRIPT) if _SCRIPT.is_file() else _MODULE
REPOSITORY = "https://github.com/kohya-ss/musubi-tuner.git"
# What musubi-tuner v0.3.4 says it needs.
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)
# What its three scripts import when they start.
MODULES = (
    *("torch", "musubi_tuner", "accelerate", "av", "cv2", "diffusers", "einops"),
    *("huggingface_hub", "numpy", "PIL", "safetensors", "sentencepiece", "toml", "torchvision"),
    *("tqdm", "transformers", "voluptuous"),
)
# Beside it: metrics, and the optimizers that it names but does not require or pin.
BESIDE = (
    "tensorboard==2.21.0",
    "prodigyopt==1.1.2",
    "schedulefree==1.4.1",
    "bitsandbytes==0.50.2",
)
# The newest pair on each index that the build's drivers run; cu124 ends there, before Muon (2.9).
TORCH = {
    "cu130": ("torch==2.9.1", "torchvision==0.24.1"),
    "cu128": ("torch==2.9.1", "torchvision==0.24.1"),
    "cu124": ("torch==2.6.0", "torchvision==0.21.0"),
    "cpu": ("torch==2.9.1", "torchvision==0.24.1"),
}
INDEX = "https://download.pytorch.org/whl"
# The least CUDA version that the driver must show; all of CUDA 12 runs on its first driver.
_LEAST_CUDA = (("cu130", (13, 0)), ("cu128", (12, 8)), ("cu124", (12, 0)))


def engine_home() -> Path:
    """Where this version of musubi-tuner is installed for the runner."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "hunyuan-lora-runner" / f"musubi-tuner-{VERSION}"


def python_of(home: Path) -> Path:
    """The Python of an install in ``home``, whether it is there or not."""
    return home / "venv" / "bin" / "python"


def our_python() -> Path:
    """The Python of the runner's own install, whether it is there or not."""
    return python_of(engine_home())


@dataclass(frozen=True)
class InstallRequest:
    """What to install: the build of torch, where musubi-tuner comes from, which Python."""

    build: str
    torch: tuple[str, ...]
    python: str
    source: str | None = None
    commit: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What decides whether an earlier install is the same."""
        return {
            "version": VERSION,
            "source": self.source or f"{REPOSITORY}@{VERSION}",
            "commit": self.commit,
            "build": self.build,
            "torch": list(self.torch),
            "beside": list(BESIDE),
        }


@dataclass(frozen=True)
class Step:
    """One command with the line that is shown for it."""

    title: str
    argv: tuple[str, ...]


def torch_build(report: str | None) -> str:
    """The build of torch for the driver whose ``nvidia-smi`` says ``report``; pure.

    Raises :class:`UserError` when there is no driver, or one too old for any build.
    """
    if report is None:
        raise UserError(
            "no NVIDIA driver was found (nvidia-smi): install the driver first, or name the build "
            "of torch yourself with --torch cu128 (cu124, cu128, cu130 or cpu)."
        )
    found = re.search(r"CUDA (?:UMD )?Version:\s*(\d+)\.(\d+)", report)
    driver = re.search(r"Driver Version:\s*([\d.]+)", report)
    name = f"driver {driver[1]}" if driver else "the driver"
    if found is None:
        raise UserError(
            f"nvidia-smi does not say which CUDA version {name} has: name the build of torch with "
            "--torch cu124, cu128 or cu130."
        )
    version = (int(found[1]), int(found[2]))
    for build, least in _LEAST_CUDA:
        if version >= least:
            return build
    raise UserError(
        f"{name} has CUDA {found[1]}.{found[2]}, and torch needs 12.0 at least: renew the driver "
        "(525 or later, 580 for the newest torch)."
    )


def steps(request: InstallRequest, home: Path) -> list[Step]:
    """The commands that make the environment in ``home``, in order; pure."""
    venv = home / "venv"
    python = str(venv / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
    index = (
        ("--index-url", f"{INDEX}/{request.build}") if request.torch == TORCH[request.build] else ()
    )
    package = request.source or f"musubi-tuner @ git+{REPOSITORY}@{VERSION}"
    pins = ("--constraint", str(home / "constraints.txt"))
    return [
        Step(
            f"an environment with {request.python}",
            (request.python, "-m", "venv", "--clear", str(venv)),
        ),
        Step(f"{', '.join(request.torch)} ({request.build})", (*pip, *index, *request.torch)),
        Step(f"musubi-tuner {VERSION} and what it needs", (*pip, package, *BESIDE, *pins)),
    ]


def constraints(request: InstallRequest) -> str:
    """Pins that keep pip from exchanging torch for another build later; pure."""
    return "".join(f"{pin}\n" for pin in request.torch if "==" in pin)
