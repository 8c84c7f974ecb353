"""The dataset stage: unpack what lies in zips, and give each item its name in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.atomic import write_text
from runner.plan_data import media_entry
from runner.stages.caching import fill, link_entries, tidy
from runner.store import link

if TYPE_CHECKING:
    from runner.execute import Context


def run(context: Context) -> None:
    """Fill the media shelf of the store, then ``dataset/`` with links and JSONL files.

    Nothing else is in ``dataset/`` afterwards.
    """
    from runner.sources import check_archive

    selection = context.facts.selection
    limit = int(context.config.dataset.max_archive_gb * 1e9)
    for archive in {item.media.archive for item in selection.items if item.media.archive}:
        check_archive(archive, limit)
    fill(context, "dataset", lambda todo: _unpack(context, todo))
    stage = context.plan.stage("dataset")
    link_entries(context, stage)
    media = context.run_dir / "dataset" / "media"
    for item in selection.items:
        if item.media.file is not None and not item.as_rgb:
            link(Path(item.media.file).absolute(), media / item.media_name)
    for name, text in stage.files:
        write_text(context.run_dir / name, text)
    kept = {media / item.media_name for item in selection.items}
    tidy(context.run_dir / "dataset", kept | {context.run_dir / name for name, _ in stage.files})


def _unpack(context: Context, todo: frozenset[str]) -> None:
    from runner.sources import write_media

    staging = context.run_dir / "staging" / "media"
    staging.mkdir(parents=True, exist_ok=True)
    items = {f"media/{media_entry(item)}": item for item in context.facts.selection.items}
    entries = [e for e in context.plan.stage("dataset").entries if e.stored in todo]
    with context.console.bar("unpacked", len(entries)) as bar:
        for done, entry in enumerate(entries, 1):
            item, temporary = items[entry.stored], staging / entry.name
            write_media(item.media, temporary, as_rgb=item.as_rgb)
            context.store.commit("media", entry.name, temporary, entry.made_of, replace=True)
            bar.update(done)
