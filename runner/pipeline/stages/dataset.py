"""The dataset stage: report on the media, unpack zips, name each item in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.core.atomic import write_text
from runner.pipeline.stages.caching import fill, link_entries, tidy
from runner.storage.store import link

if TYPE_CHECKING:
    from runner.data.select import SelectedItem
    from runner.pipeline.executor import Context


def run(context: Context) -> None:
    """Fill the media shelf of the store, then ``dataset/`` with links and JSONL files.

    Nothing else is in ``dataset/`` afterwards.
    """
    from runner.data.report.write import write_report
    from runner.data.sources import check_unchanged

    write_report(context)
    items = context.facts.selection.items
    # Most of an archive was unpacked when it was looked at.
    fill(context, "dataset", lambda todo: _unpack(context, todo))
    stage = context.plan.stage("dataset")
    check_unchanged(item.media for item in items if not _in_store(item))
    link_entries(context, stage)
    media = context.run_dir / "dataset" / "media"
    for item in items:
        if item.media.file is not None and not item.as_rgb:
            link(Path(item.media.file).absolute(), media / item.media_name)
    context.writer.set_tags(
        {
            f"dataset.{source.options.path}": source.commit
            for source in context.facts.sources
            if source.commit is not None
        }
    )
    for name, text in stage.files:
        write_text(context.run_dir / name, text)
    kept = {media / item.media_name for item in items}
    tidy(context.run_dir / "dataset", kept | {context.run_dir / name for name, _ in stage.files})


def _in_store(item: SelectedItem) -> bool:
    return item.media.file is None or item.as_rgb


def _unpack(context: Context, todo: frozenset[str]) -> None:
    from runner.data.sources import check_archive, unpack
    from runner.storage.bulk_writer import BulkWriter

    items = {
        item.media.entry: item.media
        for item in context.facts.selection.items
        if f"media/{item.media.entry}" in todo
    }
    limit = int(context.config.dataset.max_archive_gb * 1e9)
    for archive in {item.archive for item in items.values() if item.archive}:
        check_archive(archive, limit)

    def waiting() -> None:
        context.console.line("      waiting for another run, which is unpacking media")

    with (
        BulkWriter(context.store, "media", "\0".join(sorted(todo)), waiting, anew=items) as writer,
        context.console.bar("unpacked", len(items)) as bar,
    ):
        unpack(list(items.values()), writer, bar.update)
