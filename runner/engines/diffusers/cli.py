"""Common entry point of this engine's executables: exit codes, signals, offline mode."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from runner.core.errors import StageError, UserError

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable
    from io import TextIOWrapper
    from types import FrameType


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Call ``main`` with the command line's arguments and exit.

    Exit codes are 0 for success; 2 for UserError (one line on stderr) or arguments that argparse
    rejects; 1 for StageError (one line) or a bug (its traceback); 130 and 143 after SIGINT and
    SIGTERM, when clean-up handlers have run.
    """
    # Models and tokenizers are local folders; without network access a request would only hang.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _terminate)
    # Progress is read line by line while the process runs, also through a pipe.
    if hasattr(sys.stdout, "reconfigure"):
        stdout: TextIOWrapper = sys.stdout  # type: ignore[assignment]
        stdout.reconfigure(line_buffering=True)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def add_memory_limit(parser: ArgumentParser) -> None:
    """Add the argument that limits GPU memory."""
    parser.add_argument(
        "--memory_limit_gb",
        type=float,
        help="GPU memory to use, in GiB; by default all that is free",
    )


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    # SystemExit, so that ``finally`` blocks remove temporary files.
    sys.exit(128 + signum)
