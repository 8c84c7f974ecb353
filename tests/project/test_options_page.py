"""The old script's flags on docs/options.md; test_docs.py compares its tables with the code."""

from __future__ import annotations

import re

from conftest import TOP, compose

PAGE = (TOP / "docs" / "options.md").read_text(encoding="utf-8")


# Every old flag's replacement is an option.
def test_replacements_of_old_flags_exist() -> None:
    table = PAGE.split("## From the old script's flags")[1].split("##")[0]
    replacements = re.findall(r"^\| `--[^|]*\| `([\w.]+=[^`]*)`", table, re.M)
    assert len(replacements) == 10
    for text in replacements:
        key, value = text.split("=")
        compose(f"{key}={value.replace('NAME', 'adafactor').replace('N', '3').replace('X', '1')}")
