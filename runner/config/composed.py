"""A composed config as it travels: one value that nothing changes afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.schema import RunConfig


@dataclass(frozen=True)
class Composed:
    """What Hydra made of a command line.

    ``config`` is typed, ``resolved`` the same as plain values; ``overrides`` are the words of the
    command line, and ``choices`` says what was chosen of each config group.
    """

    config: RunConfig
    resolved: Mapping[str, Any]
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
