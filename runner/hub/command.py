"""What the commands of this package have in common."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.core.console import Console
from runner.core.errors import StageError, describe_os_error
from runner.core.process import Stopped, raise_on_signals
from runner.core.unexpected import guarded
from runner.hub.progress import VARIABLE, DownloadProgress
from runner.hub.remote import silence_warnings


def run(work: Callable[[DownloadProgress], Iterator[str]]) -> int:
    """Do a command's work with a bar, and print the lines that it yields.

    Returns:
        The exit code: 1 after an error of one line, or that of the signal that ended it.
    """
    progress_file = os.environ.get(VARIABLE)
    raise_on_signals()
    console = Console.for_stream(sys.stdout)
    if console.fancy:
        silence_warnings()
    try:
        with DownloadProgress(console, Path(progress_file) if progress_file else None) as progress:
            for line in work(progress):
                console.line(line)
    except (StageError, OSError) as error:
        console.error(describe_os_error(error) if isinstance(error, OSError) else str(error))
        return 1
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def exit_code_of(main: Callable[[], int]) -> int:
    """Call a command's main function; what nobody expected is one line, without secrets.

    Returns:
        Its exit code, or that of :func:`runner.core.unexpected.guarded`.
    """
    # The weights stage starts the commands in the run's folder.
    here = Path.cwd() if Path("run.json").is_file() else None
    return guarded(main, _without_secrets, here)


def _without_secrets(text: str) -> str:
    """Remove the hub's token and the passwords of addresses."""
    from huggingface_hub import get_token

    return re.sub(r"//[^\s/@]*@", "//***@", text.replace(get_token() or "\0", "***"))
