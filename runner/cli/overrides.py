"""The command line: paths taken literally, and wrong names answered with the nearest right one.

Hydra's override grammar gives meaning to spaces, brackets, quotes and commas, which a path from a
shell may well contain, and its errors speak of structs and config groups. Both are mended here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from runner.config.schema import SourceConfig, options
from runner.core.text import did_you_mean, nearest

# Tables whose keys are not the runner's: what an optimizer or a network takes.
OPEN_ENDED = ("optimizer.args.", "network.args.")

# What Hydra's grammar takes literally after a backslash, outside quotes.
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")


def path_keys() -> frozenset[str]:
    """Options whose values are paths."""
    return frozenset(option.key for option in options() if option.path)


def quote_paths(arguments: Sequence[str], *, multirun: bool) -> list[str]:
    """The arguments as Hydra needs them: paths quoted, an optimizer's own arguments allowed.

    In a sweep a value with commas stays as it is, to be swept, unless it exists as a path.
    """
    keys = path_keys()
    quoted: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and f"{key}.".startswith(OPEN_ENDED):
            # Which keys these tables take is the engine's to say; Hydra wants to be told that a
            # key may be new.
            quoted.append(f"++{argument}")
        elif (
            not equals
            or key.lstrip("+") not in keys
            or value in ("", "null")
            or _is_quoted(value)
            or (multirun and "," in value and not exists(value))
        ):
            quoted.append(argument)
        else:
            quoted.append(f"{key}={quote(value)}")
    return quoted


def exists(value: str) -> bool:
    """Whether a path is there; False for what cannot be one."""
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _is_quoted(value: str) -> bool:
    return (
        len(value) >= 2
        and value[0] == value[-1]
        and value[0] in "'\""
        and value[0] not in value[1:-1]
        and not exists(value)
    )


def quote(value: str, mark: str = "'") -> str:
    """A string that Hydra's grammar reads back as ``value``, without interpolation.

    Args:
        value: any text.
        mark: the quotation mark around it, single or double.
    """
    # OmegaConf reads ${...} in any string, quoted or not; a backslash keeps it literal.
    return _quoted(value.replace("${", "\\${"), mark)


def _quoted(value: str, mark: str = "'") -> str:
    # A run of backslashes is halved by the grammar only before a quote, and the end is one.
    escaped = re.sub(rf"(\\*){mark}", lambda m: m.group(1) * 2 + "\\" + mark, value)
    escaped = re.sub(r"(\\+)$", lambda m: m.group(1) * 2, escaped)
    return mark + escaped + mark


def hide_passwords(
    arguments: Sequence[str], environment: MutableMapping[str, str], *, multirun: bool
) -> list[str]:
    """The arguments with passwords of addresses moved to variables, which the values then name.

    Hydra writes and prints what it is given, in several forms; so it is given no password. An
    address with characters that mean something to its grammar is taken as it was typed.

    Args:
        arguments: The words of the command line.
        environment: Where the variables are set.
        multirun: Whether a value with commas is several.
    """
    return [_hide_password(argument, environment, multirun) for argument in arguments]


def _hide_password(argument: str, environment: MutableMapping[str, str], multirun: bool) -> str:
    from runner.tracking.passwords import hidden
    from runner.tracking.secrets import password_span

    key, equals, value = argument.partition("=")
    if not equals or not ("@" in value or "hf_" in value):
        return argument
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(argument)
        parsed = value if override.is_sweep_override() and not multirun else override.value()
    except HydraException:
        parsed = value if password_span(value) else _ESCAPED.sub(r"\1", value)
    before = _value_text(parsed, str)
    after = _value_text(parsed, lambda text: hidden(text, environment))
    return argument if after == before else f"{key}={after}"


def _value_text(value: Any, change: Callable[[str], str]) -> str:
    """A parsed value in Hydra's grammar, with every string in it changed."""
    from hydra.core.override_parser.types import ChoiceSweep, QuotedString

    if isinstance(value, ChoiceSweep):
        return ",".join(_value_text(item, change) for item in value.list)
    if isinstance(value, list):
        return "[" + ",".join(_value_text(item, change) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{key}:{_value_text(item, change)}" for key, item in value.items())
        return "{" + ",".join(items) + "}"
    if isinstance(value, QuotedString | str):
        return _quoted(change(value.text if isinstance(value, QuotedString) else value))
    return "null" if value is None else str(value).lower()


def diagnose(arguments: Iterable[str], choices: Mapping[str, Sequence[str]]) -> str | None:
    """What is wrong with the first argument that names no option or choice, or None."""
    known = {option.key for option in options()}
    parts = {key.rsplit(".", 1)[0] for key in known if "." in key}
    open_ended = (*OPEN_ENDED, "hydra.", "hydra/")
    for argument in arguments:
        if argument.startswith("-"):
            continue
        if argument.startswith("~"):
            continue
        key, equals, value = argument.partition("=")
        key = key.lstrip("+")
        if not equals:
            near = nearest(key, [*known, *choices])
            hint = f" Did you mean {near[0]}=...?" if near else ""
            return f"{argument!r} is no option: write KEY=VALUE.{hint}"
        if key in choices:
            wrong = _unknown_choice(key, value, choices[key])
            if wrong:
                return wrong
        elif key in parts:
            return f"{key} is a group of options: set one of them, for example {_example(key)}."
        elif key not in known and not key.startswith(open_ended):
            return f"There is no option {key}.{_option_hint(key, value, known, choices)}"
    return None


def _unknown_choice(group: str, value: str, names: Sequence[str]) -> str | None:
    for name in value.split(","):
        if name.strip("'\"") not in (*names, "null"):
            return f"There is no {group}={name}.{did_you_mean(name, names)}"
    return None


def _example(part: str) -> str:
    return next(option.key for option in options() if option.key.startswith(part + ".")) + "=..."


def by_last_part(known: Iterable[str]) -> dict[str, str]:
    """Options by the last part of their key; of several, the one that a person means first."""
    usual = ("dataset", "training", "network")
    found: dict[str, str] = {}
    for key in sorted(known, key=lambda key: (not key.startswith(usual), key)):
        found.setdefault(key.rpartition(".")[2], key)
    return found


def _option_hint(
    key: str, value: str, known: set[str], choices: Mapping[str, Sequence[str]]
) -> str:
    """The nearest option; a bare name is tried against the last part of every key too."""
    last = by_last_part(known)
    bare = key.rsplit(".", 1)[-1]
    if bare in last and bare != key:
        return f" Did you mean {last[bare]}?"
    if "." not in key:
        group = nearest(key, choices)
        if group and value in choices[group[0]]:
            return f" Did you mean {group[0]}={value}?"
        if key in last:
            return f" Did you mean {last[key]}?"
    by_key = nearest(key, [*known, *choices])
    by_part = [last[name] for name in nearest(bare, last)]
    near = by_key or by_part if "." in key else by_part or by_key
    return f" Did you mean {near[0]}?" if near else " `python -m runner --cfg job` lists them all."


_TYPE_WORDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
_WRONG_VALUE = re.compile(
    r"Value '(?P<value>.*)' (?:of type '.*' could not be converted to (?P<kind>\w+)"
    r"|is not a valid (?P<type>\w+))"
)


def readable(error: BaseException) -> str:
    """An error of Hydra or OmegaConf in the runner's words, one line."""
    from hydra.errors import OverrideParseException

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, OverrideParseException):
            return (
                f"{link.override!r} can't be read: {_first_line(link)}. Quote values with spaces "
                "or brackets twice, for example 'name=\"a b\"'."
            )
    for link in chain:
        text = str(link)
        key = re.search(r"full_key: (\S+)", text)
        where = key.group(1) if key else "an option"
        wrong = _WRONG_VALUE.search(text)
        if wrong:
            kind = _TYPE_WORDS.get(wrong["kind"] or wrong["type"], wrong["kind"] or wrong["type"])
            return f"{where}={wrong['value']} must be {kind}."
        if "is not a ListConfig" in text:
            return f"{where} must be a list, in brackets: {where}=[...]."
        stranger = re.search(r"Key '(\w+)' not in 'SourceConfig'", text)
        if stranger:
            names = [item.name for item in fields(SourceConfig)]
            hint = did_you_mean(stranger.group(1), names)
            return f"dataset.sources: there is no option {stranger.group(1)}.{hint}"
    return _first_line(error).rstrip(".") + "."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _chain(error: BaseException) -> Iterable[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
