"""The dataset stage: unpack what lies in zips, and give each item its name in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.atomic import write_text
from runner.plan_data import media_entry
from runner.store import link

if TYPE_CHECKING:
    from runner.execute import Context
    from runner.items import SelectedItem
    from runner.sources import Item


def run(context: Context) -> None:
    """Fill the media shelf of the store, then ``dataset/`` with links and JSONL files."""
    from runner.sources import check_unchanged

    items = context.facts.selection.items
    missing = {
        media_entry(item): item.media
        for item in items
        if _in_store(item) and not context.store.has("media", media_entry(item))
    }
    if missing:
        _unpack(context, list(missing.values()))
    check_unchanged(item.media for item in items if not _in_store(item))
    for item in items:
        if _in_store(item):
            target = context.store.path("media", media_entry(item))
        else:
            assert item.media.file is not None
            target = item.media.file
        link(Path(target).absolute(), context.run_dir / "dataset" / "media" / item.media_name)
    context.writer.set_tags(
        {
            f"dataset.{source.options.path}": source.commit
            for source in context.facts.sources
            if source.commit is not None
        }
    )
    for name, text in context.plan.stage("dataset").files:
        write_text(context.run_dir / name, text)


def _in_store(item: SelectedItem) -> bool:
    return item.media.file is None or item.as_rgb


def _unpack(context: Context, items: list[Item]) -> None:
    from runner.incoming import Incoming
    from runner.sources import check_archive, unpack

    limit = int(context.config.dataset.max_archive_gb * 1e9)
    for archive in {item.archive for item in items if item.archive}:
        check_archive(archive, limit)

    def waiting() -> None:
        context.console.line("      waiting for another run, which is unpacking media")

    with (
        Incoming(context.store, "media", waiting) as incoming,
        context.console.bar("unpacked", len(items)) as bar,
    ):
        unpack(items, incoming, bar.update)
