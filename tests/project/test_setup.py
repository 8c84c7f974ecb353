"""scripts/setup, with a Python, a pip and an nvidia-smi that only record."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP, Finished

from runner.engines.torch_builds import Driver, builds_of, for_runner, parse_driver

SMI = "| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda} |"
PINNED = re.search(r"^torch==(\S+)$", (TOP / "constraints.txt").read_text("utf-8"), re.MULTILINE)
# Makes an "environment" of itself, records pip's arguments, and runs the choice in a real Python.
FAKE_PYTHON = f"""\
#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python";;
  "-m pip") echo "$*" >> record; [ ! -e fail ];;
  "-I "*) exec {sys.executable} "$@";;
  --version*) echo Python 3.11.7;;
esac
"""


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


class Checkout:
    """The files of the checkout that set-up reads, and a PATH with fakes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, folder / name)
        (folder / "runner" / "engines").mkdir(parents=True)
        shutil.copy(TOP / "runner/engines/torch_builds.py", folder / "runner/engines")
        executable(folder / "bin" / "python3.11", FAKE_PYTHON)

    def driver(self, driver: str | None, cuda: str = "", capability: str = "") -> None:
        """Install a driver; without a version one that fails."""
        text = "exit 9"
        if driver is not None:
            report = SMI.format(driver=driver, cuda=cuda)
            text = f'[ "$1" ] && printf "compute_cap\\n{capability}\\n" || echo "{report}"'
        executable(self.folder / "bin" / "nvidia-smi", f"#!/bin/sh\n{text}\n")

    def setup(self) -> Finished:
        env = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin"}
        done = subprocess.run(
            [self.folder / "scripts" / "setup"], capture_output=True, text=True, env=env
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def pips(self) -> list[str]:
        """The arguments of each pip install since the last time."""
        file = self.folder / "record"
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        return [line.partition(" install --quiet ")[2] for line in text.splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


assert PINNED
TORCH = PINNED[1]
WITHOUT = [f"torch=={TORCH} -c constraints.txt", "-c constraints.txt -e .[dev]"]


def with_build(build: str) -> list[str]:
    index = f"https://download.pytorch.org/whl/{build}"
    return [
        f"--no-deps --index-url {index} torch=={TORCH}+{build}",
        "-c constraints.txt -e .[dev,gpu]",
    ]


# Without a driver torch is what pip finds by itself, and nothing for a GPU is installed; a complete
# environment is left alone.
def test_without_a_driver(checkout: Checkout) -> None:
    done = checkout.setup()
    assert (done.code, done.err) == (0, "")
    assert checkout.pips() == WITHOUT
    assert checkout.setup() == Finished(0, "", "")
    assert checkout.pips() == []


# With a driver torch is the newest build that it runs, from that build's index, with the extra for
# GPUs; an environment made before, or by an older set-up, is noticed.
def test_the_build_follows_the_driver(checkout: Checkout) -> None:
    checkout.setup()
    checkout.pips()
    checkout.driver("580.65", "13.0", "9.0")
    assert checkout.setup().code == 0
    assert checkout.pips() == with_build("cu130")
    # An update needs no other build, an older driver does.
    checkout.driver("590.10", "13.1", "9.0")
    assert checkout.setup() == Finished(0, "", "")
    checkout.driver("560.35", "12.6", "9.0")
    assert checkout.setup().code == 0
    assert checkout.pips() == with_build("cu126")
    checkout.driver("580.65", "13.0", "9.0")
    assert checkout.setup() == Finished(0, "", "")
    ready = checkout.folder / ".venv" / ".ready"
    ready.write_text(" ".join(ready.read_text().split()[:2]) + "\n")
    checkout.setup()
    assert checkout.pips() == with_build("cu130")


# A driver that can't be seen for a moment changes nothing, not even together with new pins.
def test_a_hidden_driver_keeps_the_build(checkout: Checkout) -> None:
    checkout.driver("580.65", "13.0", "9.0")
    checkout.setup()
    checkout.pips()
    checkout.driver(None)
    assert checkout.setup() == Finished(0, "", "")
    with (checkout.folder / "constraints.txt").open("a") as file:
        file.write("x==1\n")
    checkout.setup()
    assert checkout.pips() == with_build("cu130")


# A driver that runs no build of the pinned torch is said once, and the CPU still works.
def test_an_old_driver_is_said(checkout: Checkout) -> None:
    checkout.driver("470.10", "11.4", "8.6")
    done = checkout.setup()
    assert (done.code, done.err) == (
        0,
        f"note: driver 470.10 (CUDA 11.4) runs no build of torch {TORCH} for this GPU: update the "
        "driver to 525 or later.\n",
    )
    assert checkout.pips() == WITHOUT
    assert checkout.setup() == Finished(0, "", "")


# A set-up that failed is not taken for complete.
def test_a_failed_setup_is_repeated(checkout: Checkout) -> None:
    checkout.setup()
    checkout.driver("580.65", "13.0", "9.0")
    (checkout.folder / "fail").touch()
    assert checkout.setup().code != 0
    (checkout.folder / "fail").unlink()
    checkout.driver(None)
    checkout.pips()
    assert checkout.setup().code == 0
    assert checkout.pips() == WITHOUT


# The GPU counts too: torch 2.13 has code for Blackwell only with CUDA 13, for Volta only with 12.
@pytest.mark.parametrize(
    ("driver", "cuda", "capability", "expected"),
    [
        ("580.65", "13.0", "7.0", ("cu126", None)),
        ("575.51", "12.9", "8.9", ("cu126", None)),
        ("580.65", "13.0", "12.0", ("cu130", None)),
        (
            "570.86",
            "12.8",
            "12.0",
            (
                "default",
                "driver 570.86 (CUDA 12.8) runs no build of torch 2.13.0 for this GPU: update the "
                "driver to 580 or later, or train with engine=musubi.",
            ),
        ),
        ("580.65", "", "8.9", ("default", None)),
    ],
)
def test_the_build_follows_the_gpu(
    driver: str, cuda: str, capability: str, expected: tuple[str, str | None]
) -> None:
    read = parse_driver(SMI.format(driver=driver, cuda=cuda), f"compute_cap\n{capability}\n")
    build, note = for_runner("2.13.0", read, None)
    if not cuda:
        assert note == "nvidia-smi does not say which CUDA version driver 580.65 has."
        note = None
    assert (build, note) == expected
    assert for_runner("2.13.0", read, build) == (build, None)


# Newer drivers name the CUDA version otherwise.
def test_a_report_of_a_newer_driver() -> None:
    report = "| NVIDIA-SMI 595.45  Driver Version: 595.45  CUDA UMD Version: 13.2 |"
    assert parse_driver(report) == Driver("595.45", (13, 2))


# The last version of torch that has a build still has it.
def test_the_last_torch_of_a_build() -> None:
    assert builds_of("2.11.0") == ["cu130", "cu128", "cu126"]
    assert builds_of("2.12.0") == ["cu130", "cu126"]
    assert builds_of("2.15.0") == ["cu130"]
