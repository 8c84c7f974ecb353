"""An exception that nobody expected: one line, exit code 1, and a traceback in a file."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
from conftest import TOP, run_program
from other_processes import pictures
from whole_run import carry_out, run_folder_of

from runner.core.console import Console
from runner.core.errors import StageError

SECRET = "hf_gEh3iMnI5qX9vLk2wZabc"
PASSWORD = "pr0xy-pa55"
PROXY = f"http://ann:{PASSWORD}@proxy.invalid:3128"
# Python runs a file of this name before anything else.
BROKEN = f"""
import argparse, omegaconf

def fails(*_, **__):
    try:
        raise KeyError("why")
    except KeyError as error:
        raise RuntimeError("broken for {SECRET} by {PROXY}\\nand more") from error

{{name}} = fails
"""


# A library that fails is one line in every program, which says where the whole traceback is; no
# secret is in either.
@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("runner", "omegaconf.OmegaConf.to_object", ["dry_run=true", "experiment=rehearsal"]),
        ("runner", "omegaconf.OmegaConf.create", ["dry_run=true"]),
        ("runner.cache", "argparse.ArgumentParser.parse_args", []),
        ("runner.ui", "argparse.ArgumentParser.parse_args", []),
        ("runner.export", "argparse.ArgumentParser.parse_args", []),
        ("runner.stages.convert", "argparse.ArgumentParser.parse_args", []),
        ("runner.hub", "argparse.ArgumentParser.parse_args", ["a/b", "c"]),
        ("runner.hub.local_files", "argparse.ArgumentParser.parse_args", []),
    ],
)
def test_a_library_that_fails(tmp_path: Path, module: str, name: str, arguments: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN.format(name=name))
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(TOP)]),
        "TMPDIR": str(tmp_path),
        "HF_TOKEN": SECRET,
        "HTTPS_PROXY": PROXY,
    }
    done = run_program(*arguments, cwd=tmp_path, env=env, module=module)
    assert done.code == 1, done.err
    [line] = done.err.splitlines()
    assert re.match(
        r"error: unexpected RuntimeError: broken for \*\*\* by http://(ann:)?\*\*\*@proxy"
        r"\.invalid:3128 in .*, line \d+; its ",
        line,
    )
    log = Path(line.rpartition("its traceback is in ")[2])
    text = log.read_text()
    assert log.parent == tmp_path and text.count("Traceback (most recent call last)") == 2
    assert "KeyError: 'why'" in text and "and more" in text
    assert SECRET not in done.err + text and PASSWORD not in done.err + text


# In a run the traceback is beside its other logs, and its record has the line.
def test_in_a_run(tmp_path: Path) -> None:
    def fails(_: object) -> None:
        raise KeyError(f"why {SECRET}")

    media = pictures(tmp_path / "media", 2)
    console = Console.for_stream(io.StringIO())
    with pytest.raises(
        StageError, match=r"^unexpected KeyError: 'why \*\*\*' in .*, line \d+; "
    ) as caught:
        carry_out(console, tmp_path / "outputs", media, stages={"dataset": fails})
    folder = run_folder_of(tmp_path / "outputs")
    assert str(caught.value).endswith(f"its traceback is in {folder / 'logs' / 'runner.log'}")
    log = (folder / "logs" / "runner.log").read_text()
    assert "in fails" in log and SECRET not in log
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["error"]) == ("FAILED", str(caught.value))
