"""Builds of torch for CUDA, and which of them the machine's driver and GPUs run.

Both environments choose by this module. ``scripts/setup`` runs the file with the system's Python
before anything is installed, so it imports the standard library alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

INDEX = "https://download.pytorch.org/whl"
# Stands for what pip takes without an index of its own: where there is no driver.
DEFAULT = "default"

Version = tuple[int, int]


@dataclass(frozen=True)
class Build:
    """A build of torch.

    Attributes:
        cuda: the CUDA version of a driver that is given this build.
        oldest: the lowest compute capability that it has code for.
        newest: the highest.
        last_torch: the last version of torch that has it, or None while it goes on.
    """

    cuda: Version
    oldest: Version
    newest: Version
    last_torch: Version | None = None


# Newest first. cu124 and cu126 run on every driver of CUDA 12, by CUDA's compatibility of minor
# versions. Which torch has code for which GPU: pytorch/RELEASE.md, and pytorch's issues 178665
# (2.12 is without cu128) and 190385 (2.15 is without cu126).
BUILDS = {
    "cu130": Build((13, 0), (7, 5), (12, 9)),
    "cu128": Build((12, 8), (7, 0), (12, 9), last_torch=(2, 11)),
    "cu126": Build((12, 0), (5, 0), (9, 0), last_torch=(2, 14)),
    "cu124": Build((12, 0), (5, 0), (9, 0), last_torch=(2, 6)),
}
# The first drivers of these CUDA versions (CUDA's release notes).
_DRIVERS = {(12, 0): 525, (12, 8): 570, (13, 0): 580}


@dataclass(frozen=True)
class Driver:
    """What ``nvidia-smi`` says of the driver and of all GPUs.

    Attributes:
        version: the driver's version, empty if it does not say.
        cuda: the CUDA version that it runs, None if it does not say.
        capabilities: the compute capability of each GPU, empty if it does not say.
    """

    version: str
    cuda: Version | None
    capabilities: tuple[Version, ...] = ()

    def __str__(self) -> str:
        cuda = f" (CUDA {self.cuda[0]}.{self.cuda[1]})" if self.cuda else ""
        return f"driver {self.version}{cuda}" if self.version else f"the driver{cuda}"


def parse_driver(report: str, capabilities: str = "") -> Driver:
    """Read the output of ``nvidia-smi``, and that of its query for ``compute_cap``; pure."""
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*(\d+)\.(\d+)", report)
    driver = re.search(r"Driver Version:\s*([\d.]+)", report)
    lines = re.findall(r"^\s*(\d+)\.(\d+)\s*$", capabilities, re.MULTILINE)
    return Driver(
        driver[1] if driver else "",
        (int(cuda[1]), int(cuda[2])) if cuda else None,
        tuple((int(major), int(minor)) for major, minor in lines),
    )


def read_driver() -> Driver | None:
    """Ask ``nvidia-smi``; None if it is missing or fails."""
    report = _nvidia_smi()
    if report is None:
        return None
    return parse_driver(report, _nvidia_smi("--query-gpu=compute_cap", "--format=csv") or "")


def _nvidia_smi(*arguments: str) -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def chosen_build(driver: Driver, offered: Iterable[str]) -> str | None:
    """Return the newest of the builds offered that driver and GPUs run, or None; pure."""
    for name, build in BUILDS.items():
        if name not in offered or driver.cuda is None:
            continue
        if driver.cuda >= build.cuda and _has_code(build, driver):
            return name
    return None


def _has_code(build: Build, driver: Driver) -> bool:
    return all(build.oldest <= gpu <= build.newest for gpu in driver.capabilities)


def runs(name: str, driver: Driver) -> bool:
    """Return whether a build that is installed, such as ``cu126``, runs; pure.

    What nvidia-smi does not say is taken to be as it should. A driver runs every CUDA of its major
    version, so an installed build can run that would not be chosen.
    """
    cuda = re.fullmatch(r"cu(\d+)\d", name)
    if cuda is None:
        return False
    build = BUILDS.get(name)
    new_enough = driver.cuda is None or driver.cuda[0] >= int(cuda[1])
    return new_enough and (build is None or _has_code(build, driver))


def stays(installed: str, driver: Driver | None) -> bool:
    """Return whether an installed build is kept; pure.

    It is replaced only if it does not run: not because the driver was updated, or is not visible
    at the moment.
    """
    return driver is None or runs(installed, driver)


def builds_of(torch: str) -> list[str]:
    """Return the builds that a version of torch, such as ``2.13.0``, has; pure."""
    major, minor = torch.split(".")[:2]
    version = (int(major), int(minor))
    return [
        name
        for name, build in BUILDS.items()
        if build.last_torch is None or version <= build.last_torch
    ]


def no_build(driver: Driver, torch: str, offered: Iterable[str]) -> str:
    """Say what to do where :func:`chosen_build` finds none, ``torch`` being what has none; pure."""
    if driver.cuda is None:
        return f"nvidia-smi does not say which CUDA version {driver} has"
    needed = [
        build.cuda for name, build in BUILDS.items() if name in offered and _has_code(build, driver)
    ]
    if not needed:
        return f"no build of {torch} has code for all GPUs of {driver}"
    oldest = _DRIVERS[min(needed)]
    return f"{driver} runs no build of {torch} for this GPU: update the driver to {oldest} or later"


def for_runner(torch: str, driver: Driver | None, installed: str | None) -> tuple[str, str | None]:
    """Choose the build for the runner's own environment; pure.

    Args:
        torch: the version that is pinned.
        driver: the driver, if there is one.
        installed: the build that the environment has, if it is complete.

    Returns:
        The build or ``default``, and a note if the driver runs none, unless it was given before.
    """
    if installed and stays(installed, driver):
        return installed, None
    if driver is None:
        return DEFAULT, None
    offered = builds_of(torch)
    build = chosen_build(driver, offered)
    if build is not None:
        return build, None
    if installed == DEFAULT:
        return DEFAULT, None
    other = ", or train with engine=musubi" if chosen_build(driver, BUILDS) else ""
    return DEFAULT, f"{no_build(driver, f'torch {torch}', offered)}{other}."


def main(arguments: Sequence[str]) -> int:
    """Print the build, and the index that has it, for ``scripts/setup``.

    Args:
        arguments: the pinned version of torch, and the installed build or an empty text.

    Returns:
        The exit code.
    """
    torch, installed = arguments
    build, note = for_runner(torch, read_driver(), installed or None)
    if note:
        print(f"note: {note}", file=sys.stderr)
    print(build if build == DEFAULT else f"{build} {INDEX}/{build}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
