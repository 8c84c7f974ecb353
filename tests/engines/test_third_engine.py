"""An engine is added by adding a file: tests/third_engine.py, which nothing in the runner knows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TOP, Finished
from other_processes import pictures


def third(*overrides: str, cwd: Path) -> Finished:
    """The program as it is, with the third engine registered."""
    arguments = ["engine.name=third", "dataset.path=media", "dataset.resolution=[64,48]"]
    done = subprocess.run(
        [sys.executable, str(TOP / "tests" / "third_engine.py"), *arguments, *overrides],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    return Finished(done.returncode, done.stdout, done.stderr)


# Its memory plan, notices, version, files and lack of an evaluation are in a dry run.
def test_a_dry_run_asks_the_engine(tmp_path: Path) -> None:
    pictures(tmp_path / "media", 2)
    done = third("dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.err
    for said in (
        "engine third 1",
        "memory a shoebox",
        "- the third engine counts 20 steps.",
        "- the third engine fits anywhere.",
        "- engine=third has no evaluate stage yet: there will be no eval/loss.",
        "third.py latents staging/latents.toml",
        '{"rank": 32}',
    ):
        assert said in done.out, said
    assert "evaluate  " not in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"media"}


# A run goes through to the ComfyUI file and MLflow, and a second one finds the first one's work.
def test_a_run_goes_through(tmp_path: Path) -> None:
    pictures(tmp_path / "media", 2)
    done = third("network.rank=4", cwd=tmp_path)
    assert done.code == 0, done.err + done.out
    (record,) = (tmp_path / "outputs").glob("runs/*/*/run.json")
    assert json.loads(record.read_text())["status"] == "FINISHED"
    assert (record.parent / "lora_comfyui.safetensors").is_file()
    assert "[6/6] convert" in done.out
    done = third("network.rank=4", "tracking=none", cwd=tmp_path)
    assert "2 latents (done already)" in done.out and "2 captions (done already)" in done.out


# Its rules refuse before any work, and a failure is reported in its words.
@pytest.mark.parametrize(
    ("override", "code", "expected"),
    [
        ("network.rank=3", 2, "error: network.rank=3: the third engine takes even ranks.\n"),
        ("network.rank=66", 1, "failed: the third engine stopped: the spring broke (exit code 1"),
    ],
)
def test_rules_and_failures_are_its_own(
    tmp_path: Path, override: str, code: int, expected: str
) -> None:
    pictures(tmp_path / "media", 1)
    done = third(override, "tracking=none", cwd=tmp_path)
    assert done.code == code, done.out + done.err
    assert expected in done.err


# A stage that does nothing any more is ended where that was asked for, with its log's last line.
def test_a_stuck_stage_is_ended(tmp_path: Path) -> None:
    pictures(tmp_path / "media", 1)
    began = time.monotonic()
    done = third("network.rank=68", "tracking=none", "stages.timeout_minutes=0.05", cwd=tmp_path)
    assert done.code == 1, done.out + done.err
    assert time.monotonic() - began < 300
    (log,) = (tmp_path / "outputs").glob("runs/*/*/logs/train.log")
    words = (
        r"stage train failed: it was ended after \d seconds without any progress; the last line "
    )
    assert re.search(rf"^error: {words}of its log is: winding \(log: .*{log.name}\)$", done.err)


# A name that no engine has is answered with the nearest.
def test_an_unknown_engine_is_reported(tmp_path: Path) -> None:
    done = third("engine.name=thrid", cwd=tmp_path)
    assert done.code == 2
    assert done.err == "error: engine.name=thrid is not a choice. Did you mean third?\n"
