"""The evaluate stage: a loss that can be compared between runs on one dataset."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from runner.core.errors import StageError
from runner.pipeline.stages import run_commands
from runner.tracking.metrics import Point

if TYPE_CHECKING:
    from runner.pipeline.executor import Context


def run(context: Context) -> None:
    """Write ``evaluation.json``, and its losses into MLflow as ``eval/...``."""
    stage = context.plan.stage("evaluate")
    log = context.log("evaluate")
    with context.console.bar("evaluated", stage.missing) as bar:

        def count() -> None:
            bar.update(evaluated(log))

        run_commands(context, stage, count)
        count()
    file = context.run_dir / "evaluation.json"
    if not file.is_file():
        raise StageError(f"the engine ended without writing {file} (log: {log})")
    result = json.loads(file.read_text())
    now = int(time.time() * 1000)
    values = {
        "eval/loss": result["loss"],
        "eval/base_loss": result["base_loss"],
        "eval/gain": result["base_loss"] - result["loss"],
    }
    # MLflow draws what has step 0 alone as bars side by side, a curve's worth of one point else.
    context.writer.log_points([Point(key, value, 0, now) for key, value in values.items()])
    which = "held-out" if context.facts.selection.has_held_out else "training"
    context.writer.set_tags({"eval.items": f"{result['items']} {which} items"})


def evaluated(log: Path) -> int:
    """How many items the engine has said are through."""
    if not log.is_file():
        return 0
    said = re.findall(rb"^evaluated (\d+)/", log.read_bytes(), re.MULTILINE)
    return int(said[-1]) if said else 0
