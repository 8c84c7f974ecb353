"""Make a report from sources, selection, image statistics and caption lengths; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from runner.core.text import counted
from runner.data.report.findings import findings
from runner.data.report.image_statistics import ImageStatistics, statistics_key
from runner.data.report.model import Batches, LeftOut, Report, ReportedItem, SourceCounts, Tokens
from runner.data.select import SelectedItem, Selection, Source, frames_of, shapes
from runner.formats.frames import MODEL_FPS


def make_report(
    sources: Sequence[Source],
    selection: Selection,
    *,
    task: str,
    statistics: Mapping[str, ImageStatistics] | None,
    tokens: Mapping[str, Tokens],
) -> Report:
    """Make the report on a dataset.

    Args:
        sources: the run's sources.
        selection: the run's items.
        task: t2v or i2v.
        statistics: image statistics by their keys, without media that could not be read; None when
            nothing was measured.
        tokens: the lengths of the captions that may be too long for the encoder.
    """
    media = tuple(_reported(item, sources, statistics or {}) for item in selection.items)
    left_out = tuple(_left_out(sources, selection, task))
    batches = tuple(
        Batches(shape, samples, sources[shape.source].options.batch_size)
        for shape, samples in shapes(sources, selection).items()
    )
    return Report(
        sources=tuple(
            _counts(index, source, selection, batches, left_out)
            for index, source in enumerate(sources)
        ),
        media=media,
        batches=batches,
        left_out=left_out,
        notices=selection.notices,
        findings=findings(media, sources, tokens, measured=statistics is not None),
    )


def _reported(
    item: SelectedItem, sources: Sequence[Source], statistics: Mapping[str, ImageStatistics]
) -> ReportedItem:
    (width, height), bucket = item.media.size, item.bucket
    scale = max(bucket[0] / width, bucket[1] / height)
    cut = 1 - bucket[0] * bucket[1] / (width * scale * height * scale)
    used: list[tuple[int, int]] = []
    if item.crops:
        kept = frames_of(item.media, sources[item.source].options)
        for crop in sorted(item.crops):
            first, past = kept[crop.position], kept[crop.position + crop.frames - 1] + 1
            if used and first <= used[-1][1]:
                used[-1] = (used[-1][0], max(used[-1][1], past))
            else:
                used.append((first, past))
    key = statistics_key(item.media, item.correction)
    return ReportedItem(item, scale, max(0.0, cut), tuple(used), statistics.get(key))


def _left_out(sources: Sequence[Source], selection: Selection, task: str) -> Iterator[LeftOut]:
    used = {(item.source, item.media) for item in selection.items}
    for index, source in enumerate(sources):
        for name, why in source.ignored:
            yield LeftOut(index, name, why)
        for media in source.media:
            if (index, media) in used:
                continue
            if source.options.regularisation and media.media_kind == "image" and task != "i2v":
                reason = "not drawn: the set's weight takes a part of it"
            elif not media.caption and source.options.default_caption is None:
                reason = "it has no caption"
            elif media.media_kind == "image" and task == "i2v":
                reason = "task=i2v learns from clips alone"
            else:
                kept = len(frames_of(media, source.options))
                reason = f"{counted(kept, 'frame')}, fewer than every target"
            yield LeftOut(index, media.name, reason)


def _counts(
    index: int,
    source: Source,
    selection: Selection,
    batches: Sequence[Batches],
    left_out: Sequence[LeftOut],
) -> SourceCounts:
    items = [item for item in selection.items if item.source == index]
    clips = [item.media for item in items if item.media_kind == "video"]
    return SourceCounts(
        path=source.path,
        kind=source.source_kind,
        pictures=len(items) - len(clips),
        clips=len(clips),
        held_out=sum(item.held_out for item in items),
        crops=sum(len(item.crops) for item in items),
        repeats=source.options.num_repeats,
        samples=sum(row.samples for row in batches if row.shape.source == index),
        bytes=sum(item.media.bytes for item in items),
        seconds=sum(clip.frames / (clip.fps or MODEL_FPS) for clip in clips),
        left_out=sum(out.source == index for out in left_out),
    )
