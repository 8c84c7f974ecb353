"""A report as one HTML file that needs nothing else: no scripts, no fonts, no network; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from html import escape

from runner.core.text import counted, duration, readable
from runner.data.report.model import Case, Finding, Medium, Report
from runner.data.report.page import facts_of, printable
from runner.data.report.style import STYLE
from runner.formats.bucket import Size

# A thumbnail is about 5 kB; of larger datasets only the media with findings are all shown.
MAX_THUMBNAILS = 2000
# Media listed one by one under a finding.
MAX_CASES = 60
_CAPTION = 240


def html(report: Report, title: str) -> str:
    """The whole page. All that comes from the dataset is escaped."""
    body = [
        f"<h1>Dataset of {text(title)}</h1>",
        *_summary(report),
        *_findings(report),
        *_left_out(report),
        *_buckets(report),
        *_frames(report),
        *_media(report),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>Dataset of {text(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def text(value: str) -> str:
    """Any string as text or as the value of an attribute in double quotes."""
    return escape(printable(value), quote=True)


def _name(value: str) -> str:
    # A name may hold letters that turn the direction of what follows; it ends with the name.
    return f"<bdi>{text(value)}</bdi>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], classes: str = "") -> Iterator[str]:
    """A table of cells that are HTML already."""
    yield f'<div class="wide"><table class="{classes}"><thead><tr>'
    yield "".join(f'<th scope="col">{cell}</th>' for cell in head)
    yield "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    yield "</tbody></table></div>"


def _summary(report: Report) -> Iterator[str]:
    yield '<dl class="facts">'
    for name, value in facts_of(report):
        yield f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
    yield "</dl>"
    yield from _table(
        (
            *("Source", "Pictures", "Clips", "Crops", "Held out", "Repeats"),
            *("Samples an epoch", "Bytes", "Length of clips", "Left out"),
        ),
        (
            (
                f"{_name(source.path)} <small>{text(source.kind)}</small>",
                *(f"{n:,}" for n in (source.pictures, source.clips, source.crops)),
                *(f"{n:,}" for n in (source.held_out, source.repeats, source.samples)),
                *(readable(source.bytes), duration(source.seconds), f"{source.left_out:,}"),
            )
            for source in report.sources
        ),
        "numbers",
    )


def _findings(report: Report) -> Iterator[str]:
    yield '<section id="findings"><h2>Findings</h2>'
    if not report.findings:
        yield "<p>Nothing stands out.</p>"
    for finding in report.findings:
        yield from _finding(report, finding)
    yield "</section>"


def _finding(report: Report, finding: Finding) -> Iterator[str]:
    weight = "serious" if finding.serious else "mild"
    yield f'<details class="{weight}" id="finding-{finding.kind}"{" open" * finding.serious}>'
    yield f"<summary>{text(finding.text)}</summary>"
    yield '<div class="grid">'
    for case in finding.cases[:MAX_CASES]:
        yield from _case(report, case)
    yield "</div>"
    more = len(finding.cases) - MAX_CASES
    if more > 0:
        yield f"<p>and {more:,} more</p>"
    yield "</details>"


def _case(report: Report, case: Case) -> Iterator[str]:
    group = " group" if len(case.media) > 1 else ""
    yield f'<figure class="case{group}">'
    for index in case.media[:6]:
        medium = report.media[index]
        yield f'<a href="#m{index}">{_thumbnail(medium)}{_name(medium.name)}</a>'
    if len(case.media) > 6:
        yield f"<span>and {len(case.media) - 6:,} more</span>"
    if case.note:
        yield f"<figcaption>{text(case.note)}</figcaption>"
    yield "</figure>"


def _thumbnail(medium: Medium) -> str:
    if medium.look is None:
        return '<span class="none">no picture</span>'
    source = f"data:image/jpeg;base64,{text(medium.look.thumbnail)}"
    return f'<img src="{source}" alt="" loading="lazy">'


def _left_out(report: Report) -> Iterator[str]:
    yield '<section id="left-out"><h2>Left out</h2>'
    if report.left_out:
        rows = ((_name(out.name), text(out.why)) for out in report.left_out)
        yield from _table(("Medium", "Why"), rows)
    else:
        yield "<p>Nothing: every medium found is used.</p>"
    # Those that say what is left out only say again what the table does.
    notices = [notice for notice in report.notices if " left out" not in notice]
    if notices:
        yield "<ul>" + "".join(f"<li>{text(notice)}</li>" for notice in notices) + "</ul>"
    yield "</section>"


def _buckets(report: Report) -> Iterator[str]:
    samples: dict[Size, dict[str, int]] = defaultdict(lambda: {"image": 0, "video": 0})
    for medium in report.media:
        samples[medium.item.bucket][medium.item.kind] += len(medium.item.crops) or 1
    most = max(sum(kinds.values()) for kinds in samples.values())
    yield '<section id="buckets"><h2>Buckets</h2>'
    yield '<p>Pictures <i class="key image"></i> and crops of clips <i class="key video"></i></p>'
    yield '<div class="bars">'
    for size, kinds in sorted(samples.items()):
        bars = "".join(
            f'<i class="{kind}" style="width:{100 * number / most:.2f}%"></i>'
            for kind, number in kinds.items()
            if number
        )
        words = [
            counted(kinds[kind], noun)
            for kind, noun in (("image", "picture"), ("video", "crop"))
            if kinds[kind]
        ]
        label = f"{size[0]} x {size[1]}"
        yield f"<b>{label}</b><span>{bars}</span><em>{', '.join(words)}</em>"
    yield "</div>"
    yield from _table(
        ("Bucket", "Of", "Frames", "Samples an epoch", "Batches", "Last batch"),
        (
            (
                f"{row.shape.bucket[0]} x {row.shape.bucket[1]}",
                "pictures" if row.shape.kind == "image" else "clips",
                str(row.shape.frames),
                f"{row.samples:,}",
                f"{row.count:,} of {row.batch_size}",
                f"{row.last} of {row.batch_size}" if row.last else "full",
            )
            for row in report.batches
        ),
        "numbers",
    )
    yield "</section>"


def _frames(report: Report) -> Iterator[str]:
    clips = [(i, medium) for i, medium in enumerate(report.media) if medium.item.crops]
    if not clips:
        return
    yield '<section id="frames"><h2>Frames chosen</h2>'
    yield from _table(
        ("Clip", "Frames", "A second", "Crops (first frame + length)", "Used", "Share"),
        (
            (
                f'<a href="#m{index}">{_name(medium.name)}</a>',
                str(medium.item.media.frames),
                f"{medium.item.media.fps:g}" if medium.item.media.fps else "?",
                _crops(medium),
                _strip(medium),
                f"{medium.frames_used / medium.item.media.frames:.0%}",
            )
            for index, medium in clips
        ),
    )
    yield "</section>"


def _crops(medium: Medium) -> str:
    shown = [f"{crop.position}+{crop.frames}" for crop in medium.item.crops[:8]]
    more = len(medium.item.crops) - 8
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _strip(medium: Medium) -> str:
    """The clip as a bar, with what its crops cover filled."""
    frames = medium.item.media.frames
    covered = "".join(
        f'<rect x="{start}" width="{end - start}" height="1"/>' for start, end in medium.used
    )
    return (
        f'<svg class="strip" viewBox="0 0 {frames} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{medium.frames_used} of {frames} frames">{covered}</svg>'
    )


def _media(report: Report) -> Iterator[str]:
    found: dict[int, list[str]] = defaultdict(list)
    for finding in report.findings:
        for index in {index for case in finding.cases for index in case.media}:
            found[index].append(finding.kind)
    room = MAX_THUMBNAILS - len(found)
    yield f'<section id="media"><h2>All {len(report.media):,} media</h2><div class="grid">'
    for index, medium in enumerate(report.media):
        shown = index in found or room > 0
        room -= index not in found
        yield from _card(index, medium, found.get(index, []), shown)
    yield "</div></section>"


def _card(index: int, medium: Medium, found: list[str], shown: bool) -> Iterator[str]:
    item, (width, height) = medium.item, medium.item.bucket
    size = f"{item.media.size[0]} x {item.media.size[1]}"
    frames = f", {counted(item.media.frames, 'frame')}" if item.kind == "video" else ""
    caption = item.caption if len(item.caption) <= _CAPTION else item.caption[:_CAPTION] + " ..."
    yield f'<figure class="card" id="m{index}">'
    if shown:
        yield _thumbnail(medium)
    yield f"<figcaption>{_name(medium.name)}"
    for kind in found:
        yield f'<a class="tag" href="#finding-{kind}">{text(kind)}</a>'
    if item.held_out:
        yield '<span class="tag">held out</span>'
    fit = f"{medium.scale:.2f}x, {medium.cut:.0%} cut off"
    small = f"{size}{frames}, {readable(item.media.bytes)} to {width} x {height} ({fit})"
    if medium.look is not None:
        look = medium.look
        small += f"; sharpness {look.sharpness:.0f}, brightness {look.brightness:.0f}"
    yield f"<small>{small}</small><q>{text(caption)}</q></figcaption></figure>"
