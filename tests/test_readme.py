"""The README says what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP, compose

README = (TOP / "README.md").read_text(encoding="utf-8")


# The README's tables are those of the code.
def test_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(TOP / "scripts" / "readme-tables"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Every run the README tells a person to start composes.
@pytest.mark.parametrize(
    "line",
    sorted(
        set(re.findall(r"^(?:python -m runner|scripts/rehearse) (.+?)(?: +#.*)?$", README, re.M))
    ),
)
def test_commands_compose(line: str) -> None:
    import shlex

    words = [w for w in shlex.split(line) if w != "-m"]
    if any(word.startswith("--") for word in words):
        return
    compose(*[re.sub(r"=(\w+),[\w,]+$", r"=\1", word) for word in words])


# Every old flag's replacement is an option.
def test_replacements_of_old_flags_exist() -> None:
    table = README.split("## From the old script's flags")[1].split("##")[0]
    replacements = re.findall(r"^\| `--[^|]*\| `([\w.]+=[^`]*)`", table, re.M)
    assert len(replacements) == 10
    for text in replacements:
        key, value = text.split("=")
        compose(f"{key}={value.replace('NAME', 'adafactor').replace('N', '3').replace('X', '1')}")


# Pictures and pages that the README links to are there.
def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(TOP) / target).exists(), target
