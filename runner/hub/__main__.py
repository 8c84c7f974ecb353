"""``python -m runner.hub REPOSITORY --revision COMMIT FILE... --and REPOSITORY ...``: what the
weights stage runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.core.console import Console
from runner.core.errors import StageError, describe_os_error
from runner.core.process import Stopped, raise_on_signals
from runner.hub.fetch import fetch_files
from runner.hub.hub_cache import HubCache, Request
from runner.hub.progress import VARIABLE, DownloadProgress
from runner.hub.remote import hush

AND = "--and"


def main() -> int:
    """Fetch what is missing; exit code 1 with one line when that fails."""
    given = [_parser().parse_args(part) for part in _parts(sys.argv[1:])]
    requests = [
        Request(
            one.repository,
            one.revision,
            tuple(one.files),
            tuple(one.include),
            branch=one.branch,
            option=one.named,
        )
        for one in given
    ]
    checked = next((one.checked for one in given if one.checked), None)
    force = any(one.force for one in given)
    progress_file = os.environ.get(VARIABLE)
    raise_on_signals()
    console = Console.for_stream(sys.stdout)
    if console.fancy:
        hush()
    try:
        cache = HubCache.of_user(checked or Path("outputs/cache/weights/checked").absolute())
        with DownloadProgress(console, Path(progress_file) if progress_file else None) as shown:
            for file in fetch_files(requests, cache, shown, force=force):
                console.line(f"{file.sha256}  {file.path}")
    except (StageError, OSError) as error:
        console.error(describe_os_error(error) if isinstance(error, OSError) else str(error))
        return 1
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def _parts(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of each repository."""
    part: list[str] = []
    for argument in arguments:
        if argument == AND:
            yield part
            part = []
        else:
            part.append(argument)
    yield part


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runner.hub",
        description="Have files of repositories in the Hugging Face cache, whole and checked.",
        epilog=f"{AND} begins the arguments of one more repository. What is wrong with any of them "
        "is told before the first byte of the first.",
    )
    parser.add_argument("repository")
    parser.add_argument("files", nargs="+", metavar="file", help="must be there")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (main)")
    parser.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="taken where there are"
    )
    parser.add_argument("--branch", help="make this branch of the cache point at the commit")
    parser.add_argument(
        "--named", default="--revision", metavar="OPTION", help="what errors call the revision"
    )
    parser.add_argument("--checked", type=Path, help="folder of notes on files found whole")
    parser.add_argument(
        "--force", action="store_true", help="read every file again, and ask where branches are"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
