"""Write a run's report into its folder, and tell the worst of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner.core.atomic import write_text
from runner.data.report.html import html
from runner.data.report.page import notices
from runner.data.report.read import read_report

if TYPE_CHECKING:
    from runner.pipeline.executor import Context

FILE = "dataset_report.html"


def write_report(context: Context) -> None:
    """``dataset_report.html`` in the run's folder and in MLflow, the worst findings as notices."""
    report = read_report(context.config, context.facts, context.console, keep=True)
    file = context.run_dir / FILE
    write_text(file, html(report, context.plan.name))
    context.writer.log_artifact(file)
    for notice in notices(report):
        context.console.notice(notice)
