"""Processes beside a test's own: others that prepare runs, and others that hold entries."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import TOP

HELPER = TOP / "tests" / "cache_process.py"


def pictures(folder: Path, count: int, *, first: int = 0, mode: str = "RGB") -> Path:
    """Pictures of 64x48, each unlike any other, with a caption beside each."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"p{number:03}.png")
        (folder / f"p{number:03}.txt").write_text(f"caption {number}")
    return folder


def zipped(media: Path, place: Path) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for file in sorted(media.iterdir()):
            archive.write(file, file.name)
    return place


def start(outputs: Path, media: Path, log: Path, **env: str) -> subprocess.Popen[str]:
    """Another process that prepares a run. ``said`` has its output so far."""
    number = len(list(log.parent.glob("said*")))
    with (log.parent / f"said{number}").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(HELPER), str(outputs), str(media), str(log)],
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(TOP), **env},
        )
    STARTED.append((process, Path(said.name)))
    return process


STARTED: list[tuple[subprocess.Popen[str], Path]] = []


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """End what a failed test has left waiting."""
    yield
    for process, _ in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def said(process: subprocess.Popen[str]) -> str:
    return next(file for known, file in STARTED if known is process).read_text()


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for a process to end well; what it said."""
    assert process.wait(timeout=120) == 0, said(process)
    return said(process)


# Does what it is asked in a process of its own, says so, and stays.
HOLDER = """
import sys, time
from pathlib import Path
from runner.storage.leases import Leases, UseLease
what, root, *names = sys.argv[1:]
leases = Leases(Path(root))
if what == "use":
    use = UseLease(leases, "runs/other", {"name": "d", "paths": ["/d"]}, ["weights/tiny-1"])
    use.hold(names)
    print("held", flush=True)
    time.sleep(600)
with leases.lease_for_making(names, "runs/other") as (mine, others):
    print(*sorted(mine), flush=True)
    time.sleep(600)
"""


@contextmanager
def other(what: str, root: Path, *names: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that claims or uses entries, and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, what, str(root), *names],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
