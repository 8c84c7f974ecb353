"""How an option is defined: a dataclass field with its meaning, accepted values and needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Bounds:
    """Bounds of a numeric option; None means unbounded."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None


# Which of a run's digests contain an option (runner.pipeline.digests).
# resume_key: only it, as the LoRA does not depend on the option, or the fingerprint has its effect.
# fingerprint: only it, through the keys of the entries encoded with the option.
# neither: the option changes nothing that is learned or kept, or only labels a choice.
Digests = Literal["both", "resume_key", "fingerprint", "neither"]


@dataclass(frozen=True)
class Needs:
    """The values of another option without which an option has no effect.

    Attributes:
        key: the other option.
        values: its values with which the option has an effect.
        otherwise: a third option, whose values do as well.
    """

    key: str
    values: tuple[str, ...]
    otherwise: Needs | None = None


def option(
    default: Any,
    help: str,
    *,
    digests: Digests | None = None,
    needs: Needs | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    grammar: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Define an option: its default, its help text, and which values it accepts.

    Args:
        default: the value when nothing sets it.
        help: the meaning, for docs/options.md and the command line's help.
        digests: which digests contain it; None for those of its group.
        needs: the values of another option without which it has no effect.
        choices: the accepted texts; empty when any text is.
        path: whether the value is a file-system path.
        grammar: whether a text is read in Hydra's grammar, and not taken as it was typed.
        at_least: the smallest accepted number.
        above: the number that the value must exceed.
        below: the number that the value must stay below.
    """
    metadata = {
        "help": help,
        "digests": digests,
        "needs": needs,
        "choices": choices,
        "path": path,
        "grammar": grammar,
        "bounds": Bounds(at_least, above, below),
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part(cls: type, digests: Digests | None = None) -> Any:
    """Define a nested group of options; ``digests`` is for those that do not give their own."""
    return field(default_factory=cls, metadata={"digests": digests})


@dataclass(frozen=True)
class Option:
    """One option of a run, for help, checks and the table in docs/options.md."""

    key: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...]
    path: bool
    grammar: bool
    bounds: Bounds
    digests: Digests | None
    needs: Needs | None

    @property
    def literal(self) -> bool:
        """Whether the value is text, or a list of texts, taken exactly as the shell gives it."""
        return self.type.startswith(("str", "list[str")) and not self.grammar
