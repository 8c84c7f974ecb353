"""``python -m runner.hub REPOSITORY --revision COMMIT FILE... --and REPOSITORY ...``.

This is the command of the weights stage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.hub.command import exit_code_of, run
from runner.hub.fetch import fetch_files
from runner.hub.hub_cache import HubCache, Request
from runner.hub.progress import DownloadProgress

AND = "--and"


def main() -> int:
    """Fetch the missing files; return 1, after an error of one line, if that fails."""
    repositories = [_parser().parse_args(part) for part in _parts(sys.argv[1:])]
    requests = [
        Request(
            one.repository,
            one.revision,
            tuple(one.files),
            tuple(one.include),
            branch=one.branch,
            option=one.named,
        )
        for one in repositories
    ]
    checked = next((one.checked for one in repositories if one.checked), None)
    force = any(one.force for one in repositories)

    def work(progress: DownloadProgress) -> Iterator[str]:
        hub_cache = HubCache.of_user(checked or Path("outputs/cache/weights/checked").absolute())
        for file in fetch_files(requests, hub_cache, progress, force=force):
            yield f"{file.sha256}  {file.path}"

    return run(work)


def _parts(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yield the arguments of each repository."""
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
        description="Download files of repositories into the Hugging Face cache and verify them.",
        epilog=f"{AND} begins the arguments of another repository. All repositories are checked "
        "before the first download starts.",
    )
    parser.add_argument("repository")
    parser.add_argument("files", nargs="+", metavar="file", help="a required file")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (main)")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="also fetch the files that match, if there are any",
    )
    parser.add_argument("--branch", help="make this branch of the cache point at the commit")
    parser.add_argument(
        "--named",
        default="--revision",
        metavar="OPTION",
        help="what errors call the revision",
    )
    parser.add_argument("--checked", type=Path, help="folder of notes on verified files")
    parser.add_argument(
        "--force", action="store_true", help="verify every file again, and look branches up"
    )
    return parser


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
