"""How an option is defined: a dataclass field with its meaning and the values it accepts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """Bounds of a numeric option; None means unbounded."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    path: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Define an option: its default, its help text, and which values it accepts.

    Args:
        default: the value when nothing sets it.
        help: the meaning, for docs/options.md and the command line's help.
        choices: the accepted texts; empty when any text is.
        path: whether the value is a file-system path, which is taken exactly as the shell gives it.
        at_least: the smallest accepted number.
        above: the number that the value must exceed.
        below: the number that the value must stay below.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "path": path,
        "bounds": Bounds(at_least, above, below),
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part(cls: type) -> Any:
    """Define a nested group of options."""
    return field(default_factory=cls)
