"""The tables of docs/options.md are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import TOP, compose

PAGE = (TOP / "docs" / "options.md").read_text(encoding="utf-8")


# The page's tables are those of the code.
def test_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(TOP / "scripts" / "options-page"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Every old flag's replacement is an option.
def test_replacements_of_old_flags_exist() -> None:
    table = PAGE.split("## From the old script's flags")[1].split("##")[0]
    replacements = re.findall(r"^\| `--[^|]*\| `([\w.]+=[^`]*)`", table, re.M)
    assert len(replacements) == 10
    for text in replacements:
        key, value = text.split("=")
        compose(f"{key}={value.replace('NAME', 'adafactor').replace('N', '3').replace('X', '1')}")
