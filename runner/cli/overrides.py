"""Overrides: passwords are hidden from Hydra, and a wrong name gets a suggestion.

Hydra writes its arguments in several places, and its error messages are about structs and config
groups. This module fixes both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from typing import Any

from runner.cli.literal import OPEN_ENDED, quote_keeping_interpolations, quote_literals
from runner.config.dataset_schema import SourceConfig
from runner.config.schema import options
from runner.core.text import did_you_mean, nearest

# Characters that a backslash escapes in Hydra's grammar, outside quotes.
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")


def hide_passwords(
    arguments: Sequence[str], environment: MutableMapping[str, str], *, multirun: bool
) -> list[str]:
    """Move the passwords of addresses to environment variables, to which the values then refer.

    Hydra writes and prints its arguments in several forms, so it must not get a password. An
    address with characters that have a meaning in Hydra's grammar is taken as it was typed.

    Args:
        arguments: the command line.
        environment: where the variables are set.
        multirun: whether a value with commas is several values.

    Returns:
        The arguments without passwords.
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

    [prepared] = quote_literals([argument], multirun=multirun)
    try:
        override = OverridesParser.create().parse_override(prepared)
        parsed = value if override.is_sweep_override() and not multirun else override.value()
    except HydraException:
        parsed = value if password_span(value) else _ESCAPED.sub(r"\1", value)
    before = _value_text(parsed, str)
    after = _value_text(parsed, lambda text: hidden(text, environment))
    return argument if after == before else f"{key}={after}"


def _value_text(value: Any, change: Callable[[str], str]) -> str:
    """Write a parsed value in Hydra's grammar, with ``change`` applied to every string in it."""
    from hydra.core.override_parser.types import ChoiceSweep, QuotedString

    if isinstance(value, ChoiceSweep):
        return ",".join(_value_text(element, change) for element in value.list)
    if isinstance(value, list):
        return "[" + ",".join(_value_text(element, change) for element in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{key}:{_value_text(element, change)}" for key, element in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, QuotedString | str):
        return quote_keeping_interpolations(
            change(value.text if isinstance(value, QuotedString) else value)
        )
    return "null" if value is None else str(value).lower()


def diagnose(arguments: Iterable[str], choices: Mapping[str, Sequence[str]]) -> str | None:
    """Describe the first argument that names an unknown option or choice, if there is one."""
    known = {option.key for option in options()}
    parts = {key.rsplit(".", 1)[0] for key in known if "." in key}
    open_ended = (*OPEN_ENDED, "hydra.", "hydra/")
    before = ""
    for argument in arguments:
        flag, before = before, argument
        key, equals, value = argument.partition("=")
        of_a_flag = flag.startswith("-") and not equals  # --cfg job
        if of_a_flag or argument.startswith(("-", "~")):
            continue
        key = key.lstrip("+")
        if not equals:
            near = nearest(key, [*known, *choices])
            hint = f" Did you mean {near[0]}=...?" if near else ""
            return f"{argument!r} is not an option: write KEY=VALUE.{hint}"
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
    """Map the last part of a key to its option; of several, to the one most likely meant."""
    usual = ("dataset", "training", "network")
    by_name: dict[str, str] = {}
    for key in sorted(known, key=lambda key: (not key.startswith(usual), key)):
        by_name.setdefault(key.rpartition(".")[2], key)
    return by_name


def _option_hint(
    key: str, value: str, known: set[str], choices: Mapping[str, Sequence[str]]
) -> str:
    """Suggest the nearest option; a bare name is also compared with the last part of each key."""
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


_TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
_WRONG_VALUE = re.compile(
    r"Value '(?P<value>.*)' (?:of type '.*' could not be converted to (?P<target>\w+)"
    r"|is not a valid (?P<type>\w+))"
)


def readable(error: BaseException) -> str:
    """Describe an error of Hydra or OmegaConf in one plain line."""
    from hydra.errors import OverrideParseException

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, OverrideParseException):
            return (
                f"{link.override!r} can't be read: {_first_line(link)}. Quote values with spaces "
                "or brackets twice, for example 'sampling.prompts=[\"a, b\"]'."
            )
    for link in chain:
        text = str(link)
        key = re.search(r"full_key: (\S+)", text)
        where = key.group(1) if key else "an option"
        wrong = _WRONG_VALUE.search(text)
        if wrong:
            type_name = wrong["target"] or wrong["type"]
            needed = _TYPE_NAMES.get(type_name, type_name)
            return f"{where}={wrong['value']} must be {needed}."
        if "is not Optional" in text:
            return f"{where} can't be null."
        if "is not a ListConfig" in text:
            return f"{where} must be a list, in brackets: {where}=[...]."
        unknown = re.search(r"Key '(\w+)' not in 'SourceConfig'", text)
        if unknown:
            names = [field_.name for field_ in fields(SourceConfig)]
            hint = did_you_mean(unknown.group(1), names)
            return f"dataset.sources: there is no option {unknown.group(1)}.{hint}"
    return _first_line(error).rstrip(".") + "."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _chain(error: BaseException) -> Iterable[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
