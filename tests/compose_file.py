"""docker/compose.yaml as Compose sees it: anchors merged, variables put in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker" / "compose.yaml"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


def compose_file(environment: Mapping[str, str]) -> dict[str, Any]:
    """The parsed file; a variable that is not in ``environment`` takes its default, or none."""

    def value(match: re.Match[str]) -> str:
        return environment.get(match["name"]) or match["default"] or ""

    parsed: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(value, FILE.read_text("utf-8")))
    return parsed


def entrypoint(service: Mapping[str, Any], dockerfile: str) -> list[str]:
    """What a service's arguments are put behind: its own, or that of its target's last one."""
    if "entrypoint" in service:
        return list(service["entrypoint"])
    stage = dockerfile.partition(f" AS {service['build']['target']}\n")[2].partition("\nFROM ")[0]
    (line,) = re.findall(r"^ENTRYPOINT (\[.*\])$", stage, re.MULTILINE)
    found: list[str] = yaml.safe_load(line)
    return found
