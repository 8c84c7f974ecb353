"""The sources of a config, looked through; a real run unpacks archives in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config import RunConfig
from runner.errors import UserError
from runner.items import Source, SourceOptions, is_refused, is_used, source_options
from runner.store import Store

if TYPE_CHECKING:
    from runner.sources.entries import Entry
    from runner.sources.look import Keeper

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reading:
    """How sources are read. progress: called with a source's path and the media read and found so
    far. waiting: called when another run is unpacking. keep: whether media of archives go into the
    store and what is found out is noted; else nothing is written."""

    progress: Progress | None = None
    waiting: Callable[[], None] = lambda: None
    keep: bool = False


def scan_sources(
    config: RunConfig, cwd: Path, store: Store, reading: Reading
) -> tuple[Source, ...]:
    """Look into each source: what media it has, and their captions.

    Raises :class:`UserError` for sources that can't be used, and a store that can't be written to.
    """
    from runner.sources import locate, scan

    found: list[Source] = []
    limit = int(config.dataset.max_archive_gb * 1e9)
    sources = source_options(config.dataset)
    # All are found before the first is read, which can take long.
    located = [locate(options.path, options.kind, cwd=cwd) for options in sources]
    for options, (kind, path) in zip(sources, located, strict=True):
        scanned = scan(
            kind,
            path,
            max_bytes=limit,
            progress=_report(reading.progress, str(path)),
            memos=store.root / "scans",
            keep=_keep(store, options, config.task.name, reading) if reading.keep else None,
        )
        found.append(Source(options, kind, str(path), scanned.items, scanned.ignored))
    return tuple(found)


def _report(progress: Progress | None, path: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None

    def report(done: int, total: int) -> None:
        progress(path, done, total)

    return report


def _keep(
    store: Store, options: SourceOptions, task: str, reading: Reading
) -> Callable[[Sequence[Entry]], AbstractContextManager[Keeper | None] | None]:
    def keep(entries: Sequence[Entry]) -> AbstractContextManager[Keeper | None] | None:
        # What will be refused leaves no trace.
        if is_refused(entries, options, task):
            return None
        if entries[0].archive is None:
            return nullcontext()
        return _unpacking(store, options, task, reading)

    return keep


@contextmanager
def _unpacking(
    store: Store, options: SourceOptions, task: str, reading: Reading
) -> Iterator[Keeper]:
    from runner.incoming import Incoming
    from runner.sources.look import Keeper

    try:
        store.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{store.root} can't be written to ({error.strerror}): name another folder with "
            "output_dir."
        ) from error
    with store.lock("media", reading.waiting), Incoming(store, "media") as incoming:
        yield Keeper(incoming, lambda item: is_used(item, options, task))
