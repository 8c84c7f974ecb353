"""The dataset stage: report on the media, unpack archives, fill the run's ``dataset`` folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.atomic import write_text
from runner.core.console import Console
from runner.core.text import counted, readable
from runner.data.report.html import html
from runner.data.report.model import Report
from runner.data.report.page import notices
from runner.data.report.read import read_report
from runner.data.sources import check_archive, check_unchanged, unpack
from runner.formats import jsonl
from runner.pipeline.context import Context
from runner.pipeline.model import CacheEntry, Inputs, Planning, StagePlan
from runner.pipeline.stages.base import MEDIA, Stage
from runner.pipeline.stages.encoding import add_link
from runner.pipeline.stages.filling import WorkWords, fill, link_entries, tidy
from runner.pipeline.tables import groups
from runner.storage.bulk_writer import BulkWriter
from runner.storage.shared_cache import link

REPORT = "dataset_report.html"


class Dataset(Stage):
    """The stage that puts media and JSONL files into the run's folder."""

    name = "dataset"
    makes = (MEDIA,)
    refreshes_plan = True

    def problems(self, config: RunConfig, readers: Collection[str]) -> Iterator[str]:
        """Yield one line if the stage is skipped but later stages need it; pure."""
        if self.name in config.stages.skip and readers:
            yield (
                "stages.skip=[dataset] would leave the later stages without media: leave it "
                "out, finished work is recognised."
            )

    def plan(self, planning: Planning) -> StagePlan:
        """Plan the files of ``dataset``, and the media to unpack; pure."""
        inputs = planning.inputs
        force = self.name in inputs.config.stages.force
        files: list[tuple[str, str]] = []
        for held_out in (False, True):
            for group in groups(inputs, held_out=held_out):
                rows = [(f"dataset/media/{item.media_name}", item.caption) for item in group.items]
                files.append((f"dataset/{group.name}.jsonl", jsonl.render(group.media_kind, rows)))
        items = inputs.selection.items
        wanted: dict[str, CacheEntry] = {}
        for item in items:
            if item.cached:
                key, link_path = item.cache_key, f"dataset/media/{item.media_name}"
                inputs_ = item.media.cache_inputs(item.correction)
                add_link(wanted, CacheEntry(key, "media", key, inputs_, (link_path,)))
        missing = [e for e in wanted.values() if force or e.full_key not in inputs.cached]
        pictures = sum(item.media_kind == "image" for item in items)
        summary = f"{counted(pictures, 'picture')}, {counted(len(items) - pictures, 'clip')}"
        unpacked = sum(source.unpacked for source in inputs.sources)
        if unpacked:
            summary += f", {unpacked} unpacked"
        absent = {entry.full_key for entry in missing}
        corrected = {
            item.cache_key: item.copy_bytes
            for item in items
            if item.correction.changes and f"media/{item.cache_key}" in absent
        }
        if len(missing) > len(corrected):
            summary += f", {len(missing) - len(corrected)} to unpack"
        if corrected:
            most = readable(sum(corrected.values()))
            summary += f", {len(corrected)} to correct (at most {most} of disk)"
        return StagePlan(
            self.name,
            summary,
            # Media of a folder source are linked into each run's folder.
            "done" if wanted and not missing and not unpacked else "to run",
            files=tuple(files),
            entries=tuple(wanted.values()),
            missing=len(missing),
            outputs=("dataset",),
            without_commands="unpacks media into the shared cache, and fills dataset/",
        )

    def run(self, context: Context) -> None:
        """Unpack missing media, then fill ``dataset/`` with links and JSONL files.

        Other files in ``dataset/`` are removed.

        Raises:
            StageError: an entry of the cache cannot be read back as written.
        """
        write_report(context)
        items = context.inputs.selection.items
        # Most of an archive was unpacked while it was scanned.
        work = WorkWords("item", "unpacks")
        fill(context, self.name, work, lambda todo: _unpack(context, todo))
        stage = context.plan.stage(self.name)
        check_unchanged(item.media for item in items if not item.cached)
        link_entries(context, stage)
        media = context.run_dir / "dataset" / "media"
        for item in items:
            if item.media.file is not None and not item.cached:
                link(Path(item.media.file).absolute(), media / item.media_name)
        context.writer.set_tags(
            {
                f"dataset.{source.options.path}": source.commit
                for source in context.inputs.sources
                if source.commit is not None
            }
        )
        for name, text in stage.files:
            write_text(context.run_dir / name, text)
        kept = {media / item.media_name for item in items}
        tidy(
            context.run_dir / "dataset", kept | {context.run_dir / name for name, _ in stage.files}
        )


def report_on(inputs: Inputs, console: Console, *, keep: bool = False) -> Report:
    """Make the report on a run's dataset; ``keep``: save the image statistics in the cache."""
    return read_report(
        inputs.sources,
        inputs.selection,
        console,
        task=inputs.config.task.name,
        statistics_folder=inputs.root / "cache" / "looks",
        tokenizer=inputs.weights.tokenizer,
        keep=keep,
    )


def write_report(context: Context) -> None:
    """Write the report into the run's folder and MLflow, and show its worst findings."""
    report = report_on(context.inputs, context.console, keep=True)
    file = context.run_dir / REPORT
    write_text(file, html(report, context.plan.name))
    context.writer.log_artifact(file)
    for notice in notices(report):
        context.console.notice(notice)


def _unpack(context: Context, todo: frozenset[str]) -> None:
    media_by_key = {
        item.cache_key: (item.media, item.correction)
        for item in context.inputs.selection.items
        if f"media/{item.cache_key}" in todo
    }
    limit = int(context.inputs.config.dataset.max_archive_gb * 1e9)
    for archive in {media.archive for media, _ in media_by_key.values() if media.archive}:
        check_archive(archive, limit)

    def waiting() -> None:
        context.console.line("      waiting for another run, which is unpacking media")

    group = "\0".join(sorted(todo))
    with (
        BulkWriter(context.cache, "media", group, waiting, replace=media_by_key) as writer,
        context.console.bar("unpacked", len(media_by_key)) as bar,
    ):
        unpack(list(media_by_key.values()), writer, bar.update)


DATASET = Dataset()
