"""``python -m runner.hub REPOSITORY --revision COMMIT FILE...``: the weights stage by hand.

A run's commands.sh has one such line for each repository.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from runner.core.console import Console
from runner.core.errors import StageError
from runner.core.process import Stopped, raise_on_signals
from runner.hub.cache import HubCache, Request
from runner.hub.fetch import obtain
from runner.hub.log import hub_log
from runner.hub.progress import Shown


def main() -> int:
    """Fetch what is missing; exit code 1 with one line when that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m runner.hub",
        description="Have files of a repository in the Hugging Face cache, whole and checked.",
    )
    parser.add_argument("repository")
    parser.add_argument("files", nargs="+", metavar="file", help="must be there")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (main)")
    parser.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="taken where there are"
    )
    parser.add_argument("--branch", help="make this branch of the cache point at the commit")
    parser.add_argument("--checked", type=Path, help="folder of notes on files found whole")
    given = parser.parse_args()
    request = Request(
        given.repository,
        given.revision,
        tuple(given.files),
        tuple(given.include),
        branch=given.branch,
        option="--revision",
    )
    raise_on_signals()
    console = Console.for_stream(sys.stdout)
    try:
        cache = HubCache.of_user(given.checked or Path("outputs/cache/weights/checked").absolute())
        with hub_log(Path(os.devnull)), Shown(console) as shown:
            for file in obtain([request], cache, shown):
                console.line(f"{file.sha256}  {file.path}")
    except StageError as error:
        console.error(str(error))
        return 1
    except Stopped as stopped:
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
