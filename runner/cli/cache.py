"""List the shared cache by dataset and size, and delete what is no longer needed."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from runner.core.errors import UserError
from runner.core.text import did_you_mean, readable
from runner.storage.shared_cache import NAMESPACES
from runner.storage.usage import (
    OTHER,
    UNKNOWN,
    CacheContents,
    CacheObject,
    PruneCriteria,
    by_dataset,
    dataset_key,
    delete,
    matching,
    read_contents,
)

COMMANDS = ("list", "prune")
_AGES = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_SIZES = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}

_EXAMPLES = """\
examples:
  python -m runner.cache
  python -m runner.cache prune --older-than 30d
  python -m runner.cache prune --keep-below 20GB --dry-run
  python -m runner.cache prune --dataset mydata.zip

What a running job uses is never deleted. Deleted entries are made again when a run needs them.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error as one line, without the usage, and exit with code 2."""
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """List or prune the shared cache.

    Returns:
        The exit code: 2 for wrong options, 1 if something could not be deleted.
    """
    parser, arguments = _parser(), sys.argv[1:] if argv is None else argv
    try:
        _check_names(parser, arguments)
        args = parser.parse_args(arguments)
        criteria = _criteria(args)
        root = args.outputs / "cache"
        contents = read_contents(root, time.time())
        if criteria is None:
            _list(root, contents)
            return 0
        return _prune(root, contents, criteria, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader closed the pipe; keep Python from flushing stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m runner.cache",
        allow_abbrev=False,
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=96),
    )
    parser.add_argument(
        "command", nargs="?", type=_command, default="list", help="list (the default) or prune"
    )
    parser.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="folder of the runs (outputs)"
    )
    prune = parser.add_argument_group(
        "prune",
        "Shows the entries that match all options, asks, and deletes them, least recently used "
        "first.",
    )
    prune.add_argument(
        "--older-than", type=_age, metavar="30d", help="not used for at least this long (h, d, w)"
    )
    prune.add_argument(
        "--keep-below",
        type=_size,
        metavar="20GB",
        help="delete only until the cache is smaller than this",
    )
    prune.add_argument("--dataset", metavar="NAME", help="used by this dataset only")
    prune.add_argument("--unused", action="store_true", help="not used by any recorded run")
    prune.add_argument("--verbose", action="store_true", help="name each file")
    prune.add_argument(
        "--dry-run", action="store_true", help="show what would be deleted, and delete nothing"
    )
    prune.add_argument("--yes", action="store_true", help="delete without asking")
    return parser


def _check_names(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Reject the first unknown option, suggesting the nearest one."""
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in options:
            raise UserError(f"there is no option {name}.{did_you_mean(name, options)}")


def _command(text: str) -> str:
    if text not in COMMANDS:
        hint = did_you_mean(text, COMMANDS)
        raise argparse.ArgumentTypeError(f"there is no command {text!r}.{hint}")
    return text


def _age(text: str) -> float:
    return _quantity(text, _AGES, "30d, 12h or 2w")


def _size(text: str) -> int:
    return int(_quantity(text, _SIZES, "20GB or 500MB"))


def _quantity(text: str, units: dict[str, float], example: str) -> float:
    """Parse a number with a unit, ignoring case."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number with a unit, such as {example}")
    number, unit = match.groups()
    for name, worth in units.items():
        if unit.lower() == name.lower():
            return float(number) * worth
    raise argparse.ArgumentTypeError(
        f"{text!r} has an unknown unit.{did_you_mean(unit, units)}"
        if unit
        else f"{text!r} needs a unit, such as {example}"
    )


def _criteria(args: Any) -> PruneCriteria | None:
    """Return the criteria of ``prune``; None for ``list``."""
    criteria = [
        f"--{name.replace('_', '-')}"
        for name in ("older_than", "keep_below", "dataset", "unused")
        if getattr(args, name) is not None and getattr(args, name) is not False
    ]
    other_options = [
        f"--{name.replace('_', '-')}"
        for name in ("verbose", "dry_run", "yes")
        if getattr(args, name)
    ]
    if args.command == "list":
        if criteria or other_options:
            option = (criteria + other_options)[0]
            raise UserError(f"{option} is for prune: python -m runner.cache prune {option} ...")
        return None
    if not criteria:
        raise UserError(
            "prune: say what to delete, by --older-than, --keep-below, --dataset or --unused"
        )
    return PruneCriteria(args.older_than, args.keep_below, args.dataset, args.unused)


def _list(root: Path, contents: CacheContents) -> None:
    print(f"{root}: {readable(contents.bytes)}")
    if not contents.objects:
        return
    print()
    _table(contents, contents.objects)
    print()
    shared = [one for one in contents.objects if len(one.datasets) > 1]
    if shared:
        print(
            f"{_count_and_size(shared)} used by several datasets {_verb(shared, 'count')} in each."
        )
    if any(one.use_recorded and not one.datasets for one in contents.objects):
        print(f"{UNKNOWN}: not used by any recorded run.")
    if any(not one.use_recorded for one in contents.objects):
        print(f"{OTHER}: small files that any run may use.")
    print("After a prune, links in the cache/ of finished runs may be broken; that is harmless.")


def _prune(root: Path, contents: CacheContents, criteria: PruneCriteria, args: Any) -> int:
    if criteria.dataset is not None:
        key = dataset_key(contents, criteria.dataset)
        criteria = PruneCriteria(criteria.older_than, criteria.keep_below, key, criteria.unused)
    to_delete = matching(contents, criteria, time.time())
    if to_delete:
        print(f"{root}: {readable(contents.bytes)}, of which this would be deleted:\n")
        _table(contents, to_delete)
        print()
        if args.verbose:
            for one in to_delete:
                print(f"  {one.path}  {readable(one.bytes)}")
            print()
    for line in _kept_reasons(contents, criteria, to_delete):
        print(line)
    if not to_delete:
        print("Nothing to delete.")
        return 0
    if not args.yes or args.dry_run:
        if args.dry_run:
            print("Nothing was deleted (--dry-run).")
            return 0
        if not sys.stdin.isatty():
            print("Nothing was deleted: no terminal to ask at; --yes deletes without asking.")
            return 0
        if not _agreed():
            print("Nothing was deleted.")
            return 0
    deleted = delete(root, to_delete)
    print(f"Deleted {_count_and_size(deleted)}.")
    names = {one.full_key for one in deleted}
    left = [one for one in to_delete if one.full_key not in names]
    if left:
        print(f"{_count_and_size(left)} {_verb(left, 'stay')}: a run has begun to use them.")
    return 0


def _agreed() -> bool:
    try:
        return input("delete? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        print()
        return False


def _kept_reasons(
    contents: CacheContents, criteria: PruneCriteria, to_delete: Sequence[CacheObject]
) -> list[str]:
    """Explain which entries stay although the criteria seem to include them."""
    lines: list[str] = []
    of_dataset = [
        one
        for one in contents.objects
        if criteria.dataset is None or criteria.dataset in one.datasets
    ]
    used = [one for one in of_dataset if one.in_use]
    if used:
        names = {one.full_key for one in used}
        runs = sorted({lease.holder for lease in contents.leases if lease.names & names})
        lines.append(f"{_count_and_size(used)} {_verb(used, 'stay')}: in use by {', '.join(runs)}.")
    shared = [one for one in of_dataset if len(one.datasets) > 1 and not one.in_use]
    if criteria.dataset is not None and shared:
        lines.append(
            f"{_count_and_size(shared)} {_verb(shared, 'stay')}: other datasets use them too."
        )
    left = contents.bytes - sum(one.bytes for one in to_delete)
    if criteria.keep_below is not None and left > criteria.keep_below:
        lines.append(f"{readable(left)} would be left, more than {readable(criteria.keep_below)}.")
    return lines


def _count_and_size(objects: Sequence[CacheObject]) -> str:
    number = f"{len(objects)} entr{'y' if len(objects) == 1 else 'ies'}"
    return f"{number} ({readable(sum(one.bytes for one in objects))})"


def _verb(objects: Sequence[CacheObject], verb: str) -> str:
    return f"{verb}s" if len(objects) == 1 else verb


def _table(contents: CacheContents, objects: Sequence[CacheObject]) -> None:
    """Print one row per dataset with its size in each namespace, and a total."""
    others = sorted({one.namespace for one in objects} - set(NAMESPACES))
    namespaces = (*NAMESPACES, *others)
    rows = [("dataset", "entries", *namespaces, "last used")]
    for name, of_dataset in by_dataset(contents, objects).items():
        rows.append((name, *_sizes(of_dataset, namespaces), _last_used(contents, name, of_dataset)))
    rows.append(("total", *_sizes(objects, namespaces), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        print("  ".join([*cells, row[-1]]).rstrip())


def _sizes(objects: Iterable[CacheObject], namespaces: Sequence[str]) -> list[str]:
    objects = list(objects)
    sizes = [
        sum(one.bytes for one in objects if one.namespace == namespace) for namespace in namespaces
    ]
    return [str(len(objects)), *(readable(size) if size else "-" for size in sizes)]


def _last_used(contents: CacheContents, dataset: str, objects: Sequence[CacheObject]) -> str:
    names = {one.full_key for one in objects if one.in_use}
    if names:
        return f"in use by {min(lease.holder for lease in contents.leases if lease.names & names)}"
    used = contents.last_used.get(dataset) or max(one.last_used for one in objects)
    return ago(time.time() - used)


def ago(seconds: float) -> str:
    """Describe an age: ``just now``, ``5 minutes ago``, ``3 days ago``."""
    for size, unit in ((86400.0, "day"), (3600.0, "hour"), (60.0, "minute")):
        number = int(seconds // size)
        if number >= 1:
            return f"{number} {unit}{'' if number == 1 else 's'} ago"
    return "just now"
