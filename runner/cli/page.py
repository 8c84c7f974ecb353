"""The page that a dry run prints."""

from __future__ import annotations

import textwrap

from runner.config.schema import RunConfig
from runner.core.console import Console
from runner.core.text import counted
from runner.data.report.model import Report
from runner.data.report.page import page_lines
from runner.formats.published_check import PART_NAMES
from runner.pipeline.model import Inputs, Plan


def page(plan: Plan, inputs: Inputs, report: Report) -> str:
    """Render a plan: dataset, stages, exact commands, files, steps and epochs."""
    lines = [f"{plan.name}: nothing is run or written (dry_run=true)", ""]
    if inputs.engine.missing:
        lines += [
            *textwrap.wrap(f"Missing: {inputs.engine.missing}", 96, break_on_hyphens=False),
            "",
        ]
    lines += _overview(plan, inputs)
    if plan.notices:
        lines += ["", "Notes"]
        for notice in plan.notices:
            lines += textwrap.wrap(notice, 96, initial_indent="  - ", subsequent_indent="    ")
    lines += ["", *page_lines(report), "", "Stages"]
    for number, stage in enumerate(plan.stages, 1):
        mark = {"done": "done", "to run": "to run", "skipped": "skip"}[stage.state]
        lines.append(f"  {number}. {stage.name:<9} {mark:<7} {stage.summary}")
    lines += ["", "Commands (in the run's folder)"]
    for stage in plan.stages:
        if stage.to_run and stage.commands:
            lines.append(f"  # {stage.name}")
            lines += [textwrap.indent(command.shell(), "  ") for command in stage.commands]
            lines.append("")
    for name, text in plan.files:
        lines += [name, textwrap.indent(text.rstrip(), "  "), ""]
    return "\n".join(lines).rstrip() + "\n"


def _overview(plan: Plan, inputs: Inputs) -> list[str]:
    config = inputs.config
    training = config.training
    items = inputs.selection.items
    held_out = sum(item.held_out for item in items)
    clips = sum(item.media_kind == "video" for item in items)
    crops = sum(len(item.crops) for item in items)
    buckets = sorted({item.bucket for item in items})
    shapes = ", ".join(f"{width}x{height}" for width, height in buckets[:6])
    media = f"{counted(len(items) - clips, 'picture')}, {counted(clips, 'clip')}"
    if crops:
        media += f" ({counted(crops, 'crop')})"
    if held_out:
        media += f", {held_out} held out"
    local = [
        ("weights" if number == 0 else "", f"{PART_NAMES[file.part]}: {file.path}")
        for number, file in enumerate(inputs.weights.local)
    ]
    rows = [
        ("task", f"{config.task.name} on {config.model.name}, engine {inputs.engine.version}"),
        *local,
        ("data", f"{media}, from {', '.join(source.path for source in inputs.sources)}"),
        ("buckets", shapes + (f" and {len(buckets) - 6} more" if len(buckets) > 6 else "")),
        ("network", f"{config.network.name}, rank {config.network.rank}, {_alpha(config)}"),
        ("optimizer", f"{config.optimizer.name}, {config.optimizer.learning_rate:g}"),
        ("schedule", config.scheduler.name),
        ("precision", f"{config.precision.name}, memory {inputs.memory.name}"),
        (
            "steps",
            f"{plan.steps:,} = {counted(plan.epochs, 'epoch')} of {plan.steps_per_epoch}"
            + (f" (training.max_steps={training.max_steps})" if training.max_steps else ""),
        ),
        ("seed", str(inputs.seed)),
        ("run in", f"{inputs.root}/runs/<date>/<time>-{plan.name}"),
    ]
    return [f"  {name:<10} {value}" for name, value in rows]


def _alpha(config: RunConfig) -> str:
    return f"alpha {config.network.alpha:g}"


def show_plan(console: Console, plan: Plan, inputs: Inputs, report: Report) -> None:
    """Print :func:`page`."""
    for line in page(plan, inputs, report).splitlines():
        heading = bool(line) and not line.startswith(" ")
        console.line(line, style="bold" if heading else None)
