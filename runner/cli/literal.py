"""Texts and paths reach Hydra as they were typed.

Hydra's override grammar gives meaning to digits, underscores, spaces, brackets, quotes and commas:
unquoted, ``2025_11_25`` is the number 20251125. Every option whose type is text is quoted here
before Hydra reads it; what a person quoted in Hydra's grammar keeps its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import get_type_hints

from runner.config.dataset_schema import SourceConfig
from runner.config.option import Option
from runner.config.schema import options
from runner.core.text import without_interpolations

# Tables whose keys are not the runner's, but arguments of an optimizer or a network.
OPEN_ENDED = ("optimizer.args.", "network.args.")

_QUOTED = r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
_WHOLLY_QUOTED = re.compile(rf"\s*{_QUOTED}\s*", re.DOTALL)
# A quotation mark means something only where a value begins; elsewhere it is an apostrophe.
_QUOTED_PART = re.compile(rf"\s*{_QUOTED}\s*(?=,|\Z)", re.DOTALL)
_LIST = re.compile(r"\s*\[(.*)\]\s*", re.DOTALL)
# What Hydra calls in a sweep.
_SWEEP_FUNCTION = re.compile(r"(?:choice|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@cache
def _literal_options() -> Mapping[str, Option]:
    return {option.key: option for option in options() if option.literal}


def quote_literals(arguments: Sequence[str], *, multirun: bool) -> list[str]:
    """Prepare the arguments for Hydra: quote texts and paths, and allow an optimizer's arguments.

    In a sweep, a value with commas outside quotes is several values, unless it exists as a path.
    """
    return [_argument(argument, multirun) for argument in arguments]


def _argument(argument: str, multirun: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if f"{key}.".startswith(OPEN_ENDED):
        # The engine checks the keys of these tables; `++` lets Hydra accept new ones.
        return f"++{argument}"
    if key.lstrip("+") == "dataset.sources":
        return f"{key}={_source_text().sub(_quote_source_value, value)}"
    option = _literal_options().get(key.lstrip("+"))
    if option is None:
        return argument
    is_list = option.type.startswith("list")
    if not multirun or (option.path and exists(value)):
        parts = [value]
    elif _SWEEP_FUNCTION.fullmatch(value):
        return argument
    else:
        parts = _split(value, brackets=is_list)
        if is_list and not all(part == "null" or _LIST.fullmatch(part) for part in parts):
            parts = [value]
    quoted = [_list(part) if is_list else _scalar(part, path=option.path) for part in parts]
    return f"{key}={','.join(quoted)}"


def is_literal(value: str) -> bool:
    """Whether a text means itself as an option's whole value, in a sweep too."""
    return value == value.strip() and "," not in value and _scalar(value) == quote(value)


def _scalar(value: str, *, path: bool = False) -> str:
    """Quote one value, unless it is empty, null, or quoted in Hydra's grammar already."""
    if value in ("", "null"):
        return value
    if _WHOLLY_QUOTED.fullmatch(value) and not (path and exists(value)):
        return value
    return quote(value)


def _list(value: str) -> str:
    """Quote the elements of a list; what is no list is left for Hydra to read or refuse."""
    inside = _LIST.fullmatch(value)
    elements = _split(inside[1], brackets=True) if inside else []
    if not all(elements):
        return value
    # A list holds no null, so that there it is a text.
    quoted = [quote(one) if one == "null" else _scalar(one) for one in elements]
    return f"[{','.join(quoted)}]"


def _split(text: str, *, brackets: bool) -> list[str]:
    """Split a text at its commas outside quotes.

    Args:
        text: the values.
        brackets: whether commas in brackets are part of a value, if the brackets are balanced.
    """
    parts, depth, at = [""], 0, 0
    while at < len(text):
        quoted = None if parts[-1] else _QUOTED_PART.match(text, at)
        if quoted:
            parts[-1] = quoted[0]
            at = quoted.end()
            continue
        depth += _BRACKETS.get(text[at], 0) if brackets else 0
        if depth < 0:
            return _split(text, brackets=False)
        if text[at] == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += text[at]
        at += 1
    return _split(text, brackets=False) if depth else [part.strip() for part in parts]


@cache
def _source_text() -> re.Pattern[str]:
    """Match the plain texts among the values of ``dataset.sources``, and what is quoted there."""
    names = (name for name, type_ in get_type_hints(SourceConfig).items() if "str" in str(type_))
    return re.compile(
        rf"{_QUOTED}|(?P<key>[{{,]\s*(?:{'|'.join(names)})\s*:\s*)(?P<text>[^,{{}}\[\]'\"\s]"
        r"[^,{}\[\]]*?)(?=\s*[,}])",
        re.DOTALL,
    )


def _quote_source_value(match: re.Match[str]) -> str:
    return match["key"] + _scalar(match["text"]) if match["key"] else match[0]


def exists(value: str) -> bool:
    """Whether a path exists; False for text that can't be a path."""
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def quote(value: str, mark: str = "'") -> str:
    """Quote a text so that Hydra's grammar reads it back unchanged, without interpolation.

    Args:
        value: any text.
        mark: the quotation mark around it, single or double.
    """
    return quote_keeping_interpolations(without_interpolations(value), mark)


def quote_keeping_interpolations(value: str, mark: str = "'") -> str:
    """Quote a text in Hydra's grammar; OmegaConf still reads ${...} in it."""
    # The grammar halves backslashes only before a quotation mark, such as the one at the end.
    escaped = re.sub(rf"(\\*){mark}", lambda m: m.group(1) * 2 + "\\" + mark, value)
    escaped = re.sub(r"(\\+)$", lambda m: m.group(1) * 2, escaped)
    return mark + escaped + mark
