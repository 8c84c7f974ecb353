"""Gather the data of a report: image statistics and caption lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from runner.core.console import Bar, Console
from runner.data.report.image_statistics import measure_all
from runner.data.report.make import make_report
from runner.data.report.model import Report
from runner.data.report.tokens import count_tokens
from runner.data.select import Selection, Source

# Seconds before a bar is shown; one that disappears at once only distracts.
_PATIENCE = 1.0


def read_report(
    sources: Sequence[Source],
    selection: Selection,
    console: Console,
    *,
    task: str,
    statistics_folder: Path,
    tokenizer: Path | None,
    keep: bool,
) -> Report:
    """Make the report on a run's dataset.

    Args:
        sources: the run's sources.
        selection: the run's items.
        console: shows a bar when it takes a while.
        task: t2v or i2v.
        statistics_folder: the folder of stored image statistics.
        tokenizer: the folder of the text encoder's tokenizer; None if it is not on this computer.
        keep: whether to store new image statistics in the folder.
    """
    started = time.monotonic()
    bars: list[Bar] = []
    with ExitStack() as stack:

        def progress(done: int, total: int) -> None:
            if not bars and time.monotonic() - started >= _PATIENCE:
                bars.append(stack.enter_context(console.bar("media measured", total)))
            if bars:
                bars[0].update(done)

        statistics = measure_all(
            ((item.media, item.correction) for item in selection.items),
            statistics_folder,
            keep=keep,
            progress=progress,
        )
    captions = (item.caption for item in selection.items)
    return make_report(
        sources,
        selection,
        task=task,
        statistics=statistics,
        tokens=count_tokens(captions, tokenizer),
    )
