"""How an option is defined: a dataclass field with its meaning, and what it takes and needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Bounds:
    """Between what a number must be; None for no bound."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None


# In which of a run's digests an option is (runner.pipeline.digests).
# both: in either as it is set. asked: in the resume key alone; the LoRA does not depend on it, or
# the fingerprint has what became of it. planned: in the fingerprint alone, by what was encoded with
# it. neither: it changes nothing that is learned or kept, or only labels a choice.
Counts = Literal["both", "asked", "planned", "neither"]


@dataclass(frozen=True)
class Needs:
    """Without which values of another option an option does nothing; and what to say besides."""

    key: str
    values: tuple[str, ...]
    hint: str = ""


def option(
    default: Any,
    help: str,
    *,
    counts: Counts | None = None,
    needs: Needs | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its meaning, and the values it takes: choices of a text, or bounds.

    ``path`` marks values that are file-system paths, which are taken literally from the shell.
    ``counts`` is that of the option's group, unless given.
    """
    metadata = {
        "help": help,
        "counts": counts,
        "needs": needs,
        "choices": choices,
        "path": path,
        "bounds": Bounds(at_least, above, below),
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part(cls: type, counts: Counts | None = None) -> Any:
    """A nested group of options, which count in the digests as ``counts`` says."""
    return field(default_factory=cls, metadata={"counts": counts})


@dataclass(frozen=True)
class Option:
    """One option of a run, for help, checks and the table in docs/options.md."""

    key: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...]
    path: bool
    bounds: Bounds
    counts: Counts | None
    needs: Needs | None
