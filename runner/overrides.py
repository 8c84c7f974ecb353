"""The command line: paths taken literally, and wrong names answered with the nearest right one.

Hydra's override grammar gives meaning to spaces, brackets, quotes and commas, which a path from a
shell may well contain, and its errors speak of structs and config groups. Both are mended here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from runner.config import options
from runner.suggest import did_you_mean, nearest


def path_keys() -> frozenset[str]:
    """Options whose values are paths."""
    return frozenset(option.key for option in options() if option.path)


def quote_paths(arguments: Sequence[str], *, multirun: bool) -> list[str]:
    """The arguments with every path value quoted for Hydra.

    In a sweep a value with commas stays as it is, to be swept, unless it exists as a path.
    """
    keys = path_keys()
    quoted: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if (
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


def quote(value: str) -> str:
    """A string that Hydra's grammar reads back as ``value``, without interpolation."""
    # A run of backslashes is halved by the grammar only before a quote, and the end is one.
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + "\\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m.group(1) * 2, escaped)
    # OmegaConf reads ${...} in any string, quoted or not; a backslash keeps it literal.
    return "'" + escaped.replace("${", "\\${") + "'"


def diagnose(arguments: Iterable[str], choices: dict[str, list[str]]) -> str | None:
    """What is wrong with the first argument that names no option or choice, or None."""
    known = {option.key for option in options()}
    parts = {key.rsplit(".", 1)[0] for key in known if "." in key}
    open_ended = ("optimizer.args.", "network.args.", "hydra.")
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


def _unknown_choice(group: str, value: str, names: list[str]) -> str | None:
    for name in value.split(","):
        if name.strip("'\"") not in (*names, "null"):
            return f"There is no {group}={name}.{did_you_mean(name, names)}"
    return None


def _example(part: str) -> str:
    return next(option.key for option in options() if option.key.startswith(part + ".")) + "=..."


def _option_hint(key: str, value: str, known: set[str], choices: dict[str, list[str]]) -> str:
    """The nearest option; a bare name is tried against the last part of every key too."""
    last: dict[str, str] = {}
    for name in sorted(known):
        last.setdefault(name.rsplit(".", 1)[-1], name)
    bare = key.rsplit(".", 1)[-1]
    if bare in last and bare != key:
        return f" Did you mean {last[bare]}?"
    if "." not in key:
        group = nearest(key, choices)
        if group and value in choices[group[0]]:
            return f" Did you mean {group[0]}={value}?"
        if key in last:
            return f" Did you mean {last[key]}?"
    near = nearest(key, [*known, *choices])
    if not near and bare:
        near = [last[name] for name in nearest(bare, last)]
    return f" Did you mean {near[0]}?" if near else " `python -m runner --cfg job` lists them all."


def first_line(error: BaseException) -> str:
    """A library's error as one line."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("full_key", "object_type"))]
    return " ".join(useful) if useful else type(error).__name__


def readable(error: BaseException) -> str:
    """A composition error of Hydra or OmegaConf in the runner's words, one line."""
    text = "\n".join(first_line(e) for e in _chain(error))
    value = re.search(
        r"Value '(?P<value>.*)' of type '.*' could not be converted to (?P<type>\w+)", text
    )
    key = re.search(r"full_key: (?P<key>\S+)", "\n".join(str(e) for e in _chain(error)))
    where = key["key"] if key else "an option"
    if value:
        words = {
            "Integer": "a whole number",
            "Float": "a number",
            "Bool": "true or false",
        }
        kind = words.get(value["type"], value["type"])
        return f"{where}={value['value']} must be {kind}."
    return f"{first_line(error)}".rstrip(".") + "."


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
