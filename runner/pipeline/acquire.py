"""Read the sources of a run: fetch them from the Hub, unpack them into the shared cache, scan them.

An archive is unpacked and scanned in one pass. A dry run scans and writes nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from runner.config.schema import RunConfig
from runner.core.console import Console
from runner.core.process import Stopped
from runner.data.ingest import ScanOptions, scan_sources
from runner.data.select import Source
from runner.hub.progress import DownloadProgress
from runner.pipeline.inputs import refusal
from runner.pipeline.model import RunEnvironment
from runner.pipeline.stages.dataset import DATASET
from runner.storage.shared_cache import SharedCache

# Show a bar only if reading takes longer than this.
_BAR_MIN_SECONDS = 1.0


def acquire(
    config: RunConfig, cwd: Path, environment: RunEnvironment, console: Console
) -> tuple[Source, ...]:
    """Scan the sources, and bring what the run needs of them into the shared cache.

    With ``dry_run``, or for a run that cannot start, nothing is fetched or unpacked. A source that
    takes long to read has a progress bar.

    Returns:
        The sources with their media.

    Raises:
        UserError: a source cannot be used.
        Stopped: a signal arrived.
    """
    reason = None if config.dry_run else refusal(config, environment)
    started = time.monotonic()
    current: dict[str, Any] = {}

    def progress(path: str, done: int, total: int) -> None:
        if not current and time.monotonic() - started < _BAR_MIN_SECONDS:
            return
        if current.get("path") != path:
            _close(current)
            current["path"] = path
            current["bar"] = console.bar(f"reading {path}", total).__enter__()
        current["bar"].update(done)

    def waiting() -> None:
        console.line("      waiting for another run, which is unpacking media")

    options = ScanOptions(
        progress,
        waiting,
        write=not config.dry_run and reason is None,
        # Errors in the sources are reported first, but nothing is unpacked for a run that cannot
        # start.
        refused=reason,
        watch=lambda: DownloadProgress(console),
        force=DATASET.name in config.stages.force,
    )
    try:
        return scan_sources(config, cwd, SharedCache(environment.root / "cache"), options)
    except Stopped as stopped:
        _close(current)
        kept = "" if config.dry_run else "; what was unpacked is kept"
        console.error(f"ended by {stopped} while reading the sources{kept}.")
        raise
    finally:
        _close(current)


def _close(current: dict[str, Any]) -> None:
    bar = current.pop("bar", None)
    if bar is not None:
        bar.__exit__(None, None, None)
