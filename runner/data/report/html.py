"""Render a report as one HTML file, from the template ``report.html``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from runner.core.text import counted, duration, printable, readable
from runner.data.report.model import Report
from runner.data.report.page import summary_rows
from runner.formats.bucket import Size

# A thumbnail is about 5 kB; larger datasets show all media with findings, and others up to this.
MAX_THUMBNAILS = 2000
# Findings that show media as they are stored beside what is trained on.
BEFORE_AND_AFTER = ("turned", "tone-mapped", "blended", "scaled", "profile", "squared")
# Cases shown under a finding.
MAX_CASES = 60
_CAPTION = 240


def html(report: Report, title: str) -> str:
    """Render the page; everything that comes from the dataset is made printable and escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Before escaping; what macros return is escaped already.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(
        readable=readable, duration=duration, thousands="{:,}".format, share="{:.0%}".format
    )
    categories: dict[int, list[str]] = defaultdict(list)
    for finding in report.findings:
        for index in {index for case in finding.cases for index in case.media}:
            categories[index].append(finding.category)
    others = [index for index in range(len(report.media)) if index not in categories]
    buckets: dict[Size, dict[str, int]] = defaultdict(lambda: {"image": 0, "video": 0})
    for medium in report.media:
        buckets[medium.item.bucket][medium.item.media_kind] += len(medium.item.crops) or 1
    return environment.get_template("report.html").render(
        report=report,
        title=title,
        facts=list(summary_rows(report)),
        categories=categories,
        shown={*categories, *others[: max(0, MAX_THUMBNAILS - len(categories))]},
        buckets=sorted(buckets.items()),
        most=max(sum(numbers.values()) for numbers in buckets.values()),
        clips=[(i, medium) for i, medium in enumerate(report.media) if medium.item.crops],
        max_cases=MAX_CASES,
        before_and_after=BEFORE_AND_AFTER,
        max_caption=_CAPTION,
        counted=counted,
    )
