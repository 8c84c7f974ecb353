"""Gather what a report needs: pixels, or what was kept of them, and lengths of captions."""

from __future__ import annotations

import time
from contextlib import ExitStack

from runner.config.schema import RunConfig
from runner.core.console import Bar, Console
from runner.data.report.looks import look_at
from runner.data.report.make import make_report
from runner.data.report.model import Report
from runner.data.report.tokens import count_tokens
from runner.pipeline.model import Facts

# A bar that is gone within a second only distracts.
_PATIENCE = 1.0


def read_report(config: RunConfig, facts: Facts, console: Console, *, keep: bool) -> Report:
    """The report on a run's dataset. ``keep``: whether looks are written to the cache."""
    started = time.monotonic()
    bars: list[Bar] = []
    with ExitStack() as stack:

        def progress(done: int, total: int) -> None:
            if not bars and time.monotonic() - started >= _PATIENCE:
                bars.append(stack.enter_context(console.bar("looking at media", total)))
            if bars:
                bars[0].update(done)

        looks = look_at(
            (item.media for item in facts.selection.items),
            facts.root / "cache" / "looks",
            keep=keep,
            progress=progress,
        )
    captions = (item.caption for item in facts.selection.items)
    return make_report(
        facts.sources,
        facts.selection,
        task=config.task.name,
        looks=looks,
        tokens=count_tokens(captions, config, facts),
    )
