"""The recorded options of musubi-tuner's scripts, and checks against them; pure.

``scripts/record-musubi-options`` makes ``trainer_options.json``, beside this file, from the real
parsers. Arguments are parsed as argparse does, except that abbreviated names are rejected. A
``train.toml`` is checked against the same types, because musubi-tuner itself takes its values
unchecked: it would not notice a wrong type, choice or name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from runner.core.text import did_you_mean

LATENTS = "hv_1_5_cache_latents.py"
TEXT = "hv_1_5_cache_text_encoder_outputs.py"
TRAIN = "hv_1_5_train_network.py"

_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "_int_or_float": "a whole number, a share or a percentage",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float,),
    "_int_or_float": (int, float),
}


@dataclass(frozen=True)
class ScriptOption:
    """One option of a script; ``name`` has no dashes, ``type`` is the name of argparse's type."""

    name: str
    flag: bool
    type: str = "str"
    default: Any = None
    choices: tuple[str, ...] = ()
    required: bool = False
    nargs: str | None = None


@dataclass(frozen=True)
class Wrong:
    """A wrong value in a file.

    Attributes:
        what: what is wrong. list: the value must be a list. type: it has none of the option's
            types. share: it is neither a whole number nor a fraction below 1. choice: it is none of
            the option's choices.
        part: the value, or the first wrong element of a list.
    """

    what: Literal["list", "type", "share", "choice"]
    part: Any


@cache
def recorded() -> Mapping[str, Any]:
    """Read the recorded file: ``version``, ``commit`` and ``scripts``."""
    text = (files("runner.formats") / "trainer_options.json").read_text(encoding="utf-8")
    record: Mapping[str, Any] = json.loads(text)
    return record


@cache
def options(script: str) -> Mapping[str, ScriptOption]:
    """Return a script's options by name without dashes.

    Raises:
        KeyError: the script is unknown.
    """
    by_name = {}
    for dashed, recorded_option in recorded()["scripts"][script].items():
        name = dashed.lstrip("-")
        values = {**recorded_option, "choices": tuple(recorded_option.get("choices", ()))}
        by_name[name] = ScriptOption(name, **values)
    return by_name


def parse(script: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Parse a script's arguments.

    Returns:
        The values by option name, and one line for each problem. A missing required option is not
        a problem here.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    known = options(script)
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not is_option(word):
            problems.append(f"{word!r} belongs to no option.")
            continue
        dashed, equals, inline = word.partition("=")
        option = known.get(dashed[2:]) if dashed.startswith("--") else None
        words = [inline] if equals else []
        while not equals and rest and not is_option(rest[0]) and _takes(option, len(words)):
            words.append(rest.pop(0))
        if option is None:
            names = [f"--{name}" for name in known]
            problems.append(f"{script} has no option {dashed}.{did_you_mean(dashed, names)}")
        elif option.flag:
            values[option.name] = True
            if words:
                problems.append(f"{dashed} takes no value, not {words[0]!r}.")
        elif option.nargs is None and not words:
            problems.append(f"{dashed} needs a value.")
        else:
            read = [_read(option, text, problems) for text in words]
            values[option.name] = read if option.nargs else read[0]
    return values, problems


def types_of(option: ScriptOption) -> tuple[type, ...]:
    """Return the types that a value in a file may have; for a list, each of its elements."""
    return (bool,) if option.flag else _TYPES.get(option.type, (str,))


def flattened(table: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a TOML file as musubi-tuner does for ``--config_file``: sections are one table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return flat


def wrong_value(option: ScriptOption, value: Any) -> Wrong | None:
    """Check the value that a file gives to the option; None when it is right."""
    if option.nargs is None:
        return _wrong_part(option, value)
    if not isinstance(value, list):
        return Wrong("list", value)
    return next((wrong for part in value if (wrong := _wrong_part(option, part))), None)


def check_table(script: str, table: Mapping[str, Any]) -> list[str]:
    """Return one line for each problem with a TOML table given as ``--config_file``."""
    problems: list[str] = []
    known = options(script)
    for key, value in flattened(table).items():
        if key not in known:
            problems.append(f"{script} has no option {key}.{did_you_mean(key, known)}")
        elif wrong := wrong_value(known[key], value):
            problems.append(_message(known[key], wrong))
    return problems


def arguments_of(script: str, table: Mapping[str, Any]) -> list[str]:
    """Turn the table into arguments of the script, in its order; a false flag is omitted."""
    known = options(script)
    arguments: list[str] = []
    for key, value in table.items():
        option = known[key]
        if option.flag:
            arguments += [f"--{key}"] if value else []
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif is_option(str(value)):
            # As an argument of its own, argparse would take it for an option.
            arguments += [f"--{key}={value}"]
        else:
            arguments += [f"--{key}", str(value)]
    return arguments


def is_option(word: str) -> bool:
    """Whether argparse takes the word for an option: it starts with a dash and is not a number."""
    return len(word) > 1 and word[0] == "-" and not re.fullmatch(r"-\d+|-\d*\.\d+", word)


def _takes(option: ScriptOption | None, number: int) -> bool:
    """Whether the option takes one more word; an unknown option takes all that follow."""
    return option is None or option.nargs is not None or (not option.flag and number == 0)


def _read(option: ScriptOption, text: str, problems: list[str]) -> Any:
    value: Any = text
    try:
        if option.type == "int":
            value = int(text)
        elif option.type == "float":
            value = float(text)
        elif option.type == "_int_or_float":
            value = _int_or_float(text)
    except ValueError:
        problems.append(f"--{option.name} must be {_TYPE_WORDS[option.type]}, not {text!r}.")
    if option.choices and value not in option.choices:
        problems.append(f"--{option.name} can't be {text!r}.{did_you_mean(text, option.choices)}")
    return value


def _int_or_float(text: str) -> int | float:
    """Read a number of steps as musubi-tuner does: 0.1 and 10% are fractions of all steps."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    number = float(text)
    return int(number) if number >= 1 and number.is_integer() else number


def _wrong_part(option: ScriptOption, value: Any) -> Wrong | None:
    if type(value) not in types_of(option):
        return Wrong("type", value)
    if option.type == "_int_or_float" and isinstance(value, float) and value >= 1:
        # A float is multiplied by the number of steps.
        return Wrong("share", value)
    if option.choices and value not in option.choices:
        return Wrong("choice", value)
    return None


def _message(option: ScriptOption, wrong: Wrong) -> str:
    name, value = option.name, wrong.part
    if wrong.what == "choice":
        return f"{name} can't be {value!r}.{did_you_mean(str(value), option.choices)}"
    if wrong.what == "share":
        return f"{name}={value!r} must be a whole number or a share below 1."
    if wrong.what == "list":
        return f"{name}={value!r} must be a list."
    what = "true or false" if option.flag else _TYPE_WORDS.get(option.type, "a text")
    if option.type == "float":
        what += " with a decimal point"
    return f"{name}={value!r} must be {what}."
