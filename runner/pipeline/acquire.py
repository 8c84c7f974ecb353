"""Have the sources of a run: fetched from the hub, unpacked into the store, looked through.

Unpacking and looking are one pass over an archive. A dry run looks and writes nothing.
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

# A bar that is gone within a second only distracts.
_PATIENCE = 1.0


def acquire(
    config: RunConfig, cwd: Path, environment: RunEnvironment, console: Console
) -> tuple[Source, ...]:
    """The sources as they are on this machine; what a run needs of them lies in the store then.

    With ``dry_run``, or for a run that will be refused, nothing is fetched or unpacked. A source
    that takes a while to look through has a bar. Raises :class:`runner.core.errors.UserError` for
    sources that can't be used.
    """
    why = None if config.dry_run else refusal(config, environment)
    started = time.monotonic()
    shown: dict[str, Any] = {}

    def progress(path: str, done: int, total: int) -> None:
        if not shown and time.monotonic() - started < _PATIENCE:
            return
        if shown.get("path") != path:
            _close(shown)
            shown["path"] = path
            shown["bar"] = console.bar(f"reading {path}", total).__enter__()
        shown["bar"].update(done)

    def waiting() -> None:
        console.line("      waiting for another run, which is unpacking media")

    reading = ScanOptions(
        progress,
        waiting,
        keep=not config.dry_run and why is None,
        # Sources may be refused first; but nothing is unpacked for a run that can't be.
        refused=why,
        watch=lambda: DownloadProgress(console),
        force=DATASET.name in config.stages.force,
    )
    try:
        return scan_sources(config, cwd, SharedCache(environment.root / "cache"), reading)
    except Stopped as stopped:
        _close(shown)
        kept = "" if config.dry_run else "; what was unpacked is kept"
        console.error(f"ended by {stopped} while reading the sources{kept}.")
        raise
    finally:
        _close(shown)


def _close(shown: dict[str, Any]) -> None:
    bar = shown.pop("bar", None)
    if bar is not None:
        bar.__exit__(None, None, None)
