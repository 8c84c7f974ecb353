"""The commonest mistakes on the command line, each answered with the command as it should be."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import unquote

from runner.cli.overrides import OPEN_ENDED, by_last_part, diagnose, exists, quote
from runner.config.schema import Option, options
from runner.core.paths import command_here
from runner.core.text import nearest

# Hydra's flags; --help, --version and --multirun are taken before they are looked at.
_FLAGS = (
    *("--hydra-help", "--resolve", "--run", "-r", "--cfg", "-c", "--package", "-p"),
    *("--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
_PRINTED = ("job", "hydra", "all")
# What people call options after other trainers' flags, where no table of ours has the name.
_OTHER_NAMES = {
    "lr": "optimizer.learning_rate",
    "steps": "training.max_steps",
    "batch": "dataset.batch_size",
    "data": "dataset.path",
    "frames": "dataset.target_frames",
    "output": "output_dir",
}
_MEDIA_LIST = re.compile(r".*\.(zip|jsonl)", re.IGNORECASE)

Choices = Mapping[str, Sequence[str]]
# What is wrong, and the arguments as they should be; None where nobody can tell.
_Correction = tuple[str, list[str] | None]


def mistake(arguments: Sequence[str], choices: Choices, *, multirun: bool) -> str | None:
    """Describe the first mistake in a command line.

    Args:
        arguments: without ``-m``.
        choices: the config groups and the choices of each.
        multirun: whether ``-m`` was among them.

    Returns:
        One line with the command as it should be typed, or None where nothing is known to be wrong.
    """
    args, described = list(arguments), ""
    # One line, and a command that is right in all of its parts.
    for _ in range(len(args) + 1):
        found = _first(args, choices, multirun)
        if found is None:
            break
        what, right = found
        if right is None:
            return what
        described = described or what
        multirun, args = multirun or right == args, right
    return f"{described}: {command(args, multirun=multirun)}" if described else None


def undecodable(texts: Iterable[str]) -> str | None:
    """Describe the first text that has bytes which are no letters here, if one has."""
    encoding = sys.getfilesystemencoding()
    for text in texts:
        if any("\udc80" <= letter <= "\udcff" for letter in text):
            shown = text.encode("utf-8", "backslashreplace").decode()
            remedy = "rename it" if encoding == "utf-8" else "set PYTHONUTF8=1"
            return f"{shown!r} is not in {encoding}, in which names are read here: {remedy}."
    return None


def command(arguments: Sequence[str], *, multirun: bool = False) -> str:
    """The command with these arguments, as a shell takes it."""
    flags = ["-m"] if multirun else []
    return f"{command_here('runner')} {shlex.join([*flags, *arguments])}".rstrip()


def _first(args: list[str], choices: Choices, multirun: bool) -> _Correction | None:
    rules = [_print_what, _flag, _bare_word, _plus_or_tilde, _path, _list]
    for rule in rules if multirun else [*rules, _comma]:
        for n in range(len(args)):
            found = rule(args, n, choices)
            if found is not None:
                return found
    return None


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
    """The option or group that a flag means: by its key, musubi-tuner's name or its last part."""
    from runner.formats.train_options import TABLE

    known = _known()
    if name in known or name in choices:
        return name
    row = TABLE.get(name)
    meant = [
        _OTHER_NAMES.get(name),
        row.instead if row else None,
        name.replace("_", ".", 1),
        by_last_part(known).get(name),
    ]
    return next((key for key in meant if key in known or key in choices), None)


def _bare_word(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """A word without an equals sign: a path alone, or the rest of a value with spaces."""
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
    if not option.path and not option.type.startswith("str"):
        return None
    end = next((m for m in range(n, len(args)) if "=" in args[m]), len(args))
    whole = _quoted(option, " ".join([value, *args[n:end]]))
    return "A value with spaces needs quotes", [*args[: n - 1], f"{key}={whole}", *args[end:]]


def _quoted(option: Option, text: str) -> str:
    """``text`` as a value: paths are taken as they are, and Hydra reads the rest."""
    return text if option.path else quote(text, '"')


def _plus_or_tilde(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """Plus and tilde: what would be added is there, and nothing can be left out."""
    argument = args[n]
    key = argument.lstrip("+~").partition("=")[0]
    rest = [*args[:n], *args[n + 1 :]]
    if argument.startswith("~") and not key.startswith(OPEN_ENDED):
        instead = f"choose another with {key}=..." if key in choices else "leave it out"
        return f"{argument} would take away options that every run needs ({instead})", rest
    if argument.startswith("+") and key in choices:
        return f"{key} is chosen without a plus", [*args[:n], argument.lstrip("+"), *args[n + 1 :]]
    # Hydra would add what is no option, and nobody would read it.
    wrong = diagnose([argument], choices) if argument.startswith("+") else None
    return (wrong, None) if wrong else None


def _path(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """A path as a browser or Windows writes it."""
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
        # The shell takes backslashes away that are not quoted.
        rest = "/..."
    right = [*args[:n], f"{key}=/mnt/{letter.lower()}{rest}", *args[n + 1 :]]
    return f"Under WSL drive {letter.upper()}: is the folder /mnt/{letter.lower()}", right


def _list(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """A list without its brackets."""
    key, _, value = args[n].lstrip("+").partition("=")
    option = _known().get(key)
    if option is None or not option.type.startswith("list") or not value:
        return None
    parts = _top_level(value)
    if all(part.startswith(("[", "$", "'", '"')) or part == "null" for part in parts):
        return None
    # A resolution of one number is a square's.
    parts = parts * 2 if key == "dataset.resolution" and len(parts) == 1 else parts
    right = [*args[:n], f"{key}=[{','.join(parts)}]", *args[n + 1 :]]
    return f"{key} is a list, in brackets", right


def _comma(args: list[str], n: int, choices: Choices) -> _Correction | None:
    """Commas outside brackets and quotes, which only a sweep takes."""
    key, _, value = args[n].lstrip("+").partition("=")
    option = _known().get(key)
    if len(_top_level(value)) < 2:
        return None
    if key in choices or (option and option.type.startswith(("int", "float", "bool"))):
        return "Several values are a sweep, which needs -m", args
    if option is None or option.path or not option.type.startswith("str"):
        return None
    right = [*args[:n], f"{key}={_quoted(option, value)}", *args[n + 1 :]]
    return "A text with a comma needs quotes (or -m, for a sweep over its parts)", right


def _top_level(value: str) -> list[str]:
    """The parts of ``value`` between commas that lie in no bracket, brace or quotation."""
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
