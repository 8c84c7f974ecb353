"""The dataset stage: report on the media, unpack zips, name each item in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.atomic import write_text
from runner.plan_data import media_entry
from runner.store import link

if TYPE_CHECKING:
    from runner.execute import Context


def run(context: Context) -> None:
    """Fill the media shelf of the store, then ``dataset/`` with links and JSONL files."""
    from runner.report.write import write_report
    from runner.sources import check_archive, write_media

    write_report(context)
    selection, store = context.facts.selection, context.store
    limit = int(context.config.dataset.max_archive_gb * 1e9)
    for archive in {item.media.archive for item in selection.items if item.media.archive}:
        check_archive(archive, limit)
    staging = context.run_dir / "staging" / "media"
    stage = context.plan.stage("dataset")
    with context.console.bar("items", len(selection.items)) as bar:
        for done, item in enumerate(selection.items, 1):
            if item.media.file is not None and not item.as_rgb:
                target = item.media.file
            else:
                name = media_entry(item)
                if not store.has("media", name):
                    staging.mkdir(parents=True, exist_ok=True)
                    temporary = staging / name
                    write_media(item.media, temporary, as_rgb=item.as_rgb)
                    made_of = {"media": item.media.sha256, "as_rgb": item.as_rgb}
                    store.commit("media", name, temporary, made_of)
                target = store.path("media", name)
            link(Path(target).absolute(), context.run_dir / "dataset" / "media" / item.media_name)
            bar.update(done)
    for name, text in stage.files:
        write_text(context.run_dir / name, text)
