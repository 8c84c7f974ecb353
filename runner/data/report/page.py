"""Render a report as a few lines, for a dry run's page and the console of a real run."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator

from runner.core.text import counted, duration, named, printable, readable
from runner.data.report.model import Report, ReportedItem
from runner.formats.bucket import Size
from runner.formats.captions import MAX_TOKENS

_WIDTH = 96
_LINES = 15
_NOTICES = 3


def page_lines(report: Report) -> list[str]:
    """Render the section of a dry run's page, without what its notes say already."""
    lines = ["Dataset"]
    rows = list(summary_rows(report))
    if report.left_out:
        rows.append(("left out", f"{len(report.left_out)} media (see the notes)"))
    for name, value in rows:
        lines.append(textwrap.shorten(printable(value), _WIDTH - 13, placeholder=" ..."))
        lines[-1] = f"  {name:<10} {lines[-1]}"
    left = list(report.findings)
    while left:
        wrapped = _wrapped(f"  {'!' if left[0].serious else '-'} {left[0].line}")
        # The last line may be needed to say how many are left.
        if len(lines) + len(wrapped) > _LINES - (len(left) > 1):
            break
        lines += wrapped
        left.pop(0)
    if left:
        more = "" if len(left) == len(report.findings) else " more"
        lines.append(f"  - {len(left)}{more} in dataset_report.html, which a run writes")
    return lines


def notices(report: Report) -> list[str]:
    """Return the worst findings, one line each."""
    worst = [printable(finding.line) for finding in report.serious]
    more = len(worst) - _NOTICES
    if more > 0:
        return [*worst[:_NOTICES], f"{more} more in dataset_report.html."]
    return worst


def _wrapped(text: str) -> list[str]:
    """Wrap a text to at most two lines."""
    return textwrap.wrap(
        printable(text),
        _WIDTH,
        subsequent_indent="    ",
        break_on_hyphens=False,
        max_lines=2,
        placeholder=" ...",
    )


def summary_rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield names and values that summarise the dataset."""
    sources = report.sources
    seconds = sum(source.seconds for source in sources)
    samples = sum(source.samples for source in sources)
    held_out = sum(source.held_out for source in sources)
    size = readable(sum(source.bytes for source in sources))
    media = f"{size}, clips of {duration(seconds)} in all" if seconds else size
    media += f"; {counted(samples, 'sample')} per epoch"
    if held_out:
        media += f", {held_out} held out"
    yield "media", media
    if len(sources) > 1:
        yield (
            "sources",
            "; ".join(
                f"{source.path}: {counted(source.pictures, 'picture')}, "
                f"{counted(source.clips, 'clip')}, {counted(source.samples, 'sample')}"
                for source in sources[:4]
            )
            + (f" and {len(sources) - 4} more" if len(sources) > 4 else ""),
        )
    yield "buckets", _buckets(report)
    yield "batches", _batches(report)
    clips = [medium for medium in report.media if medium.item.crops]
    if clips:
        yield "frames", _frames(clips)
        yield "rates", _rates(clips)
    yield "fit", _fit(report)
    yield "captions", _captions(report)


def _buckets(report: Report) -> str:
    pictures: dict[Size, int] = defaultdict(int)
    crops: dict[Size, int] = defaultdict(int)
    for medium in report.media:
        item = medium.item
        pictures[item.bucket] += item.media_kind == "image"
        crops[item.bucket] += len(item.crops)
    ordered = sorted(pictures, key=lambda size: (-pictures[size] - crops[size], size))
    parts = []
    for size in ordered[:3]:
        held = [(pictures[size], "picture"), (crops[size], "crop")]
        words = ", ".join(counted(number, noun) for number, noun in held if number)
        parts.append(f"{size[0]}x{size[1]} {words}")
    more = len(ordered) - 3
    return "; ".join(parts) + (f"; {more} more" if more > 0 else "")


def _batches(report: Report) -> str:
    count = sum(row.count for row in report.batches)
    sizes = sorted({row.batch_size for row in report.batches})
    text = f"{count:,} of {'' if sizes == [1] else 'up to '}{' or '.join(map(str, sizes))}"
    partial = sum(row.last > 0 for row in report.batches)
    return text if sizes == [1] else f"{text}, {partial} of them not full"


def _frames(clips: list[ReportedItem]) -> str:
    lengths = sorted({crop.frames for medium in clips for crop in medium.item.crops})
    crops = sum(len(medium.item.crops) for medium in clips)
    frames = sum(medium.item.media.frames for medium in clips)
    used = sum(medium.frames_used for medium in clips)
    shown = named([str(length) for length in lengths], 8)
    return (
        f"{counted(crops, 'crop')} of {shown} frames use {used / frames:.0%} of {frames:,} frames"
    )


def _rates(clips: list[ReportedItem]) -> str:
    """Count the clips of each rate, and those that are brought to another."""
    numbers: dict[str, int] = defaultdict(int)
    for medium in clips:
        fps, rate = medium.item.media.fps, medium.item.correction.rate
        stored = "unknown" if fps is None else f"{fps:.4g}"
        trained = stored if rate is None else f"{rate:.4g}"
        numbers[stored if trained == stored else f"{stored} to {trained}"] += 1
    rows = sorted(numbers.items(), key=lambda row: (-row[1], row[0]))
    shown = named([f"{rate} ({counted(number, 'clip')})" for rate, number in rows], 6)
    return f"frames per second: {shown}"


def _fit(report: Report) -> str:
    grown = [medium for medium in report.media if medium.scale > 1]
    cut = max(medium.cut for medium in report.media)
    text = "none enlarged"
    if grown:
        largest = max(medium.scale for medium in grown)
        text = f"{len(grown)} of {len(report.media)} enlarged, at most {largest:.2f}x"
    return f"{text}; at most {cut:.0%} of an item cut off"


def _captions(report: Report) -> str:
    captions = {medium.item.caption for medium in report.media}
    longest = max(len(caption.encode()) for caption in captions)
    return (
        f"{len(captions)} different, the longest of {longest:,} bytes "
        f"(the encoder takes {MAX_TOKENS:,} tokens)"
    )
