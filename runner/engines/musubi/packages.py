"""The packages of musubi-tuner's environment, and the commands that install them.

Pure, except that environment variables may choose the location. The image installs musubi-tuner
with this module and few others (docker/Dockerfile), so that changes elsewhere do not repeat the
install.

The packages other than torch were tested with musubi-tuner v0.3.4 on the CPU; the torch builds for
CUDA are those it requires and could not be installed where this was written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.errors import UserError
from runner.core.paths import shortest
from runner.engines.torch_builds import INDEX, Driver, chosen_build, no_build

VERSION = "v0.3.4"
# A checkout's script also creates the runner's own environment if it is missing.
_SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "install-musubi"
_MODULE = "python -m runner.engines.musubi_install install"
COMMAND = shortest(_SCRIPT) if _SCRIPT.is_file() else _MODULE
REPOSITORY = "https://github.com/kohya-ss/musubi-tuner.git"
# The Python versions that musubi-tuner v0.3.4 declares.
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)
# What its three scripts import when they start.
MODULES = (
    *("torch", "musubi_tuner", "accelerate", "av", "cv2", "diffusers", "einops"),
    *("huggingface_hub", "numpy", "PIL", "safetensors", "sentencepiece", "toml", "torchvision"),
    *("tqdm", "transformers", "voluptuous"),
)
# Added to it: metrics, and the optimizers that it offers but does not require or pin.
BESIDE = (
    "tensorboard==2.21.0",
    "prodigyopt==1.1.2",
    "schedulefree==1.4.1",
    "bitsandbytes==0.50.2",
)
# The newest torch and torchvision for each CUDA build; cu124 ends at 2.6, without Muon (2.9).
TORCH = {
    "cu130": ("torch==2.9.1", "torchvision==0.24.1"),
    "cu128": ("torch==2.9.1", "torchvision==0.24.1"),
    "cu124": ("torch==2.6.0", "torchvision==0.21.0"),
    "cpu": ("torch==2.9.1", "torchvision==0.24.1"),
}


def engine_home() -> Path:
    """Return the folder of the runner's own install of this version."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "hunyuan-lora-runner" / f"musubi-tuner-{VERSION}"


def python_of(home: Path) -> Path:
    """Return the path of the Python of an install in ``home``, which need not exist."""
    return home / "venv" / "bin" / "python"


def our_python() -> Path:
    """Return the path of the Python of the runner's own install, which need not exist."""
    return python_of(engine_home())


@dataclass(frozen=True)
class InstallRequest:
    """A requested install: the build of torch, the source of musubi-tuner, and the Python."""

    build: str
    torch: tuple[str, ...]
    python: str
    source: str | None = None
    commit: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The values that an earlier install must have to be the same."""
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
    """One command, and the line to show for it."""

    title: str
    argv: tuple[str, ...]


def torch_build(driver: Driver | None) -> str:
    """Choose the build of torch for a driver; pure.

    Raises:
        UserError: there is no driver, or it runs none of the builds.
    """
    if driver is None:
        raise UserError(
            "no NVIDIA driver was found (nvidia-smi): install the driver first, or name the build "
            "of torch yourself with --torch cu128 (cu124, cu128, cu130 or cpu)."
        )
    build = chosen_build(driver, TORCH)
    if build is not None:
        return build
    reason = no_build(driver, "torch", TORCH)
    if driver.cuda is None:
        reason += ": name the build of torch with --torch cu124, cu128 or cu130"
    raise UserError(f"{reason}.")


def steps(request: InstallRequest, home: Path) -> list[Step]:
    """Return the commands that create the environment in ``home``, in order; pure."""
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
    """Return pins that keep pip from replacing torch by another build; pure."""
    return "".join(f"{pin}\n" for pin in request.torch if "==" in pin)
