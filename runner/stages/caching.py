"""What the latents and text stages share: encode the missing entries, commit them, link all.

The engine writes into a staging folder of the run's own, never into the store: musubi-tuner
rewrites and deletes files where it works, through links too.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from runner.atomic import write_text
from runner.errors import StageError
from runner.stages import run_commands
from runner.store import Shelf, link

if TYPE_CHECKING:
    from runner.execute import Context
    from runner.plan_model import Stage


def fill_and_link(context: Context, shelf: Shelf) -> None:
    """Run one caching stage.

    The shelf is locked while its missing entries are made, so that of two runs wanting the same
    entry one makes it and the other waits. Raises :class:`StageError` when the engine fails or
    leaves an entry out.
    """

    def waiting() -> None:
        context.console.line(f"      waiting for another run, which is encoding {shelf}")

    stage = context.plan.stage(shelf)
    if stage.missing and stage.state != "skipped":
        with context.store.lock(shelf, waiting):
            _encode(context, shelf)
    for entry in context.plan.stage(shelf).entries:
        target = context.store.path(shelf, entry.name)
        if not target.is_file() and stage.state == "skipped":
            continue
        if not target.is_file():
            raise StageError(f"{shelf} of {entry.links[0]} are missing from the cache")
        for place in entry.links:
            link(target.absolute(), context.run_dir / place)


def _encode(context: Context, shelf: Shelf) -> None:
    # Another run may have made some of them while this one waited.
    stage = context.replan().stage(shelf)
    if not stage.missing:
        return
    staging = context.run_dir / "staging"
    for name, text in stage.files:
        write_text(context.run_dir / name, text)
    folders = sorted(_folders(staging, shelf, stage.files))
    with context.console.bar("encoded", stage.missing) as bar:

        def count() -> None:
            bar.update(min(stage.missing, sum(len(_made(folder)) for folder in folders)))

        try:
            run_commands(context, stage, count)
        except BaseException:
            # Hours of encoding are kept when the engine fails late, or is stopped.
            with suppress(OSError):
                _commit(context, stage, shelf, [f for f in _all_made(folders) if _whole(f)])
            raise
        count()
    _commit(context, stage, shelf, _all_made(folders))
    for entry in stage.entries:
        if not context.store.has(shelf, entry.name):
            raise StageError(f"the engine made no {entry.produced}; see {context.log(shelf)}")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _commit(context: Context, stage: Stage, shelf: Shelf, files: list[Path]) -> None:
    """Move what the engine made into the store, in place of older entries where that is forced."""
    made = {file.name: file for file in files}
    for entry in stage.entries:
        if entry.produced in made:
            if shelf in context.config.stages.force:
                context.store.path(shelf, entry.name).unlink(missing_ok=True)
            context.store.commit(shelf, entry.name, made[entry.produced], entry.made_of)


def _whole(file: Path) -> bool:
    """Whether a cache file was written to its end: its header says how long it must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False


def _all_made(folders: list[Path]) -> list[Path]:
    return [file for folder in folders for file in _made(folder)]


def _folders(staging: Path, shelf: Shelf, files: tuple[tuple[str, str], ...]) -> set[Path]:
    return {
        staging / Path(name).stem
        for name, _ in files
        if name.startswith(f"staging/{shelf}") and name.endswith(".jsonl")
    }


def _made(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [f for f in folder.iterdir() if f.suffix == ".safetensors" and f.name[0] != "."]
