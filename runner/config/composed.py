"""A composed config: one immutable value that is passed through the program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.schema import RunConfig


@dataclass(frozen=True)
class Composed:
    """A config that Hydra composed from a command line.

    Attributes:
        config: the typed config.
        resolved: the same config as plain values, interpolations resolved.
        overrides: the arguments of the command line.
        choices: the choice made in each config group.
    """

    config: RunConfig
    resolved: Mapping[str, Any]
    overrides: tuple[str, ...]
    choices: Mapping[str, str]


def given_keys(overrides: Collection[str]) -> frozenset[str]:
    """Return the options and groups that overrides name, as typed on a command line."""
    return frozenset(override.lstrip("+").partition("=")[0] for override in overrides)
