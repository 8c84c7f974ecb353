"""The programs that run in musubi-tuner's Python: in its oldest one, and never in the runner's."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import TOP

from runner.engines.musubi.packages import OLDEST_PYTHON
from runner.engines.musubi.probes import program

FOLDER = TOP / "runner" / "engines" / "musubi"
PROBES = [file for file in sorted((FOLDER / "probes").glob("*.py")) if file.stem != "__init__"]
PROGRAMS = [FOLDER / "corrected.py", *PROBES]


# They run on the oldest Python that musubi-tuner has, and import nothing of ours: it is not there.
@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_programs_stand_alone(file: Path) -> None:
    tree = ast.parse(file.read_text(), feature_version=OLDEST_PYTHON)
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert modules <= {*sys.stdlib_module_names, "av", "torch", "transformers"}


# Nothing imports them: they would act at once.
def test_programs_are_not_imported() -> None:
    names = "|".join(
        [
            r"musubi\.corrected",
            r"musubi import .*\bcorrected",
            *(rf"probes(\.| import .*\b){file.stem}\b" for file in PROBES),
        ]
    )
    for file in (TOP / "runner").rglob("*.py"):
        assert not re.search(rf"^ *(from|import) .*({names})", file.read_text(), re.MULTILINE), file


# What is run is the file's own text.
def test_programs_are_their_files() -> None:
    assert [program(file.stem) for file in PROBES] == [file.read_text() for file in PROBES]
