"""Detection of common mistakes on the command line, with the corrected command."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from urllib.parse import unquote

from runner.cli.literal import OPEN_ENDED, exists, is_literal, quote
from runner.cli.overrides import by_last_part, diagnose
from runner.config.option import Option
from runner.config.schema import options
from runner.core.paths import command_here
from runner.core.text import nearest

# Hydra's flags, except --help, --version and --multirun, which are handled before this check.
_FLAGS = (
    *("--hydra-help", "--resolve", "--run", "-r", "--cfg", "-c", "--package", "-p"),
    *("--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
_PRINTED = ("job", "hydra", "all")
# Names that other trainers use for options, unless a table of the runner has them.
_OTHER_NAMES = {
    "lr": "optimizer.learning_rate",
    "steps": "training.max_steps",
    "batch": "dataset.batch_size",
    "data": "dataset.path",
    "frames": "dataset.target_frames",
    "output": "output_dir",
}
# A list, an interpolation of one, or several lists by Hydra's function.
_LIST_LIKE = re.compile(r"\s*\[.*\]\s*|\$.*|null|choice\(.*\)", re.DOTALL)
_MEDIA_LIST = re.compile(r".*\.(zip|7z|tgz|tar(\.\w+)?|jsonl)", re.IGNORECASE)

Choices = Mapping[str, Sequence[str]]
# The problem, and the corrected arguments, or None if the correction is unknown.
_Correction = tuple[str, list[str] | None]


def mistake(arguments: Sequence[str], choices: Choices, *, multirun: bool) -> str | None:
    """Describe the first mistake in a command line.

    Args:
        arguments: the command line without ``-m``.
        choices: the config groups and the choices of each.
        multirun: whether ``-m`` was among the arguments.

    Returns:
        One line with the corrected command, or None if no mistake is known.
    """
    args, described = list(arguments), ""
    # The line describes the first mistake, and its command has all of them corrected.
    for _ in range(len(args) + 1):
        correction = _first(args, choices, multirun)
        if correction is None:
            break
        problem, right = correction
        if right is None:
            return problem
        described = described or problem
        multirun, args = multirun or right == args, right
    return f"{described}: {command(args, multirun=multirun)}" if described else None


def undecodable(texts: Iterable[str]) -> str | None:
    """Describe the first text with bytes that are not valid in this computer's encoding."""
    encoding = sys.getfilesystemencoding()
    for text in texts:
        if any("\udc80" <= letter <= "\udcff" for letter in text):
            escaped = text.encode("utf-8", "backslashreplace").decode()
            remedy = "rename it" if encoding == "utf-8" else "set PYTHONUTF8=1"
            return f"{escaped!r} is not in {encoding}, the encoding of this computer: {remedy}."
    return None


def command(arguments: Sequence[str], *, multirun: bool = False) -> str:
    """Write the command with these arguments, quoted for a shell."""
    flags = ["-m"] if multirun else []
    return f"{command_here('runner')} {shlex.join([*flags, *arguments])}".rstrip()


def _first(args: list[str], choices: Choices, multirun: bool) -> _Correction | None:
    rules = [_print_what, _flag, _bare_word, _plus_or_tilde, _path, _list]
    for rule in rules if multirun else [*rules, _comma]:
        for n in range(len(args)):
            correction = rule(args, n, choices)
            if correction is not None:
                return correction
    return None


@cache
def _known() -> dict[str, Option]:
    return {option.key: option for option in options()}


def _print_what(args: list[str], n: int, choices: Choices) -> _Correction | None:
    if args[n] not in ("--cfg", "-c") or (n + 1 < len(args) and args[n + 1] in _PRINTED):
        return None
    rest = [*args[:n], *args[n + 1 :]]
    return f"{args[n]} needs what to print, job for the run's options", ["--cfg", "job", *rest]


def _flag(args: list[str], n: int, choices: Choices) -> _Correction | None:
    name, equals, value = args[n].partition("=")
    if not name.startswith("-") or name in _FLAGS:
        return None
    bare = name.lstrip("-").replace("-", "_")
    key = _option_of(bare, choices)
    if key is None:
        flags = difflib.get_close_matches(bare, ("help", "multirun", "version", "cfg", "info"), 1)
        keys = [f"{key}=..." for key in nearest(bare, [*_known(), *choices])]
        meant = [*(f"--{flag}" for flag in flags), *keys][:1]
        return f"There is no flag {name}.{''.join(f' Did you mean {m}?' for m in meant)}", None
    taken = 1
    if not equals:
        following = args[n + 1] if n + 1 < len(args) else "-"
        option = _known().get(key)
        if option is not None and option.type == "bool":
            value = "true"
        elif not following.startswith("-") and "=" not in following:
            value, taken = following, 2
        else:
            return f"Options are written without dashes: {key}=... instead of {name}.", None
    right = [*args[:n], f"{key}={value}", *args[n + taken :]]
    return "Options are written without dashes", right


def _option_of(name: str, choices: Choices) -> str | None:
    """Find the option or group that a flag means: by key, musubi-tuner's name or last part."""
    from runner.formats.train_options import TABLE

    known = _known()
    if name in known or name in choices:
        return name
    row = TABLE.get(name)
    meant = [
        _OTHER_NAMES.get(name),
        row.set_by if row else None,
        name.replace("_", ".", 1),
        by_last_part(known).get(name),
    ]
    return next((key for key in meant if key in known or key in choices), None)


def _bare_word(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """Correct a word without an equals sign: a lone path, or the rest of a value with spaces."""
    word, before = args[n], args[n - 1] if n else ""
    if word.startswith(("-", "~")) or "=" in word or before in _FLAGS:
        return None
    key, equals, value = before.partition("=")
    option = _known().get(key) if equals else None
    media = _MEDIA_LIST.fullmatch(word) is not None
    if option is None or (media and key != "dataset.path"):
        if not media and not exists(word):
            return None
        return f"{word!r} needs its option", [*args[:n], f"dataset.path={word}", *args[n + 1 :]]
    if not option.type.startswith("str"):
        return None
    end = next((m for m in range(n, len(args)) if "=" in args[m]), len(args))
    whole = _quoted(option, " ".join([value, *args[n:end]]))
    return "A value with spaces needs quotes", [*args[: n - 1], f"{key}={whole}", *args[end:]]


def _quoted(option: Option, text: str) -> str:
    """Quote ``text`` as a value, unless it is one that means itself."""
    return text if option.literal and is_literal(text) else quote(text, '"')


def _plus_or_tilde(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """Correct plus and tilde: options can be neither added nor removed."""
    argument = args[n]
    key = argument.lstrip("+~").partition("=")[0]
    rest = [*args[:n], *args[n + 1 :]]
    if argument.startswith("~") and not key.startswith(OPEN_ENDED):
        instead = f"choose another with {key}=..." if key in choices else "leave it out"
        return f"{argument} would remove options that every run needs ({instead})", rest
    if argument.startswith("+") and key in choices:
        return f"{key} is chosen without a plus", [*args[:n], argument.lstrip("+"), *args[n + 1 :]]
    # Hydra would add an unknown option, which nothing reads.
    wrong = diagnose([argument], choices) if argument.startswith("+") else None
    return (wrong, None) if wrong else None


def _path(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """Correct a path written as in a browser or in Windows."""
    key, _, value = args[n].lstrip("+").partition("=")
    option = _known().get(key)
    if option is None or not option.path or exists(value):
        return None
    if value.startswith("file://"):
        place = unquote(value.removeprefix("file://").removeprefix("localhost"))
        return "A path is written without file://", [*args[:n], f"{key}={place}", *args[n + 1 :]]
    drive = re.fullmatch(r"([A-Za-z]):(.*)", value)
    if drive is None:
        return None
    letter, rest = drive[1], drive[2].replace("\\", "/")
    if not rest.startswith("/"):
        # The shell removed the unquoted backslashes.
        rest = "/..."
    right = [*args[:n], f"{key}=/mnt/{letter.lower()}{rest}", *args[n + 1 :]]
    return f"In WSL, drive {letter.upper()}: is the folder /mnt/{letter.lower()}", right


def _list(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """Correct a list without brackets."""
    key, _, value = args[n].lstrip("+").partition("=")
    option = _known().get(key)
    if option is None or not option.type.startswith("list") or not value:
        return None
    parts = _top_level(value)
    if all(_LIST_LIKE.fullmatch(part) for part in parts):
        return None
    # Hydra would take a quoted list for a text, of which nothing would be left.
    parts = [part.strip("[] ") if "[" in part[:2] else part for part in map(_unquoted_list, parts)]
    # A resolution of one number means a square.
    parts = parts * 2 if key == "dataset.resolution" and len(parts) == 1 else parts
    right = [*args[:n], f"{key}=[{','.join(parts)}]", *args[n + 1 :]]
    return f"{key} is a list, in brackets", right


def _unquoted_list(part: str) -> str:
    return part[1:-1] if re.fullmatch(r"(['\"])\[.*\]\1", part, re.DOTALL) else part


def _comma(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """Correct commas outside brackets and quotes, which mean a sweep where no text is meant."""
    key, _, value = args[n].lstrip("+").partition("=")
    option = _known().get(key)
    if len(_top_level(value)) < 2:
        return None
    swept = option and (option.choices or option.type.startswith(("int", "float", "bool")))
    if key in choices or swept:
        return "Several values are a sweep, which needs -m", args
    return None


def _top_level(value: str) -> list[str]:
    """Split ``value`` at the commas outside brackets, braces and quotes."""
    parts, depth, quoted = [""], 0, ""
    for letter in value:
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "'\"":
            quoted = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts
