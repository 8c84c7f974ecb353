"""The evaluate stage: compute a loss that is comparable between runs on the same dataset."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from runner.core.errors import StageError
from runner.core.text import counted
from runner.engines.base import Engine, Job
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, StagePlan
from runner.pipeline.stages.base import HELD_OUT_ITEMS, LORA, Stage, run_commands
from runner.tracking.metrics import Point

EVALUATION = "evaluation.json"


class Evaluate(Stage):
    """The stage that writes ``evaluation.json``."""

    name = "evaluate"
    needs = (LORA, HELD_OUT_ITEMS)
    makes = (EVALUATION,)

    def missing_from(self, engine: Engine, job: Job) -> str | None:
        """Return a notice if the engine has no evaluation; pure."""
        if engine.evaluate(job, "dataset.toml") is not None:
            return None
        return f"engine={engine.name} has no evaluate stage yet: there will be no eval/loss."

    def plan(self, planning: Planning) -> StagePlan:
        """Plan the evaluation, on held-out items if there are any; pure."""
        inputs = planning.inputs
        held_out = inputs.selection.has_held_out
        toml = "validation.toml" if held_out else "dataset.toml"
        command = planning.engine.evaluate(inputs.job, toml)
        # Each crop of a clip has a loss of its own.
        number = sum(
            max(1, len(item.crops)) for item in inputs.selection.items if item.held_out == held_out
        )
        which = "held-out" if held_out else "training"
        return StagePlan(
            self.name,
            f"eval/loss on {counted(number, f'{which} item')}",
            "to run",
            commands=(command,) if command is not None else (),
            missing=number,
            outputs=(EVALUATION,),
        )

    def run(self, context: Context) -> None:
        """Write ``evaluation.json``, and log its losses to MLflow as ``eval/...``.

        Raises:
            StageError: the engine failed or wrote no ``evaluation.json``.
        """
        stage = context.plan.stage(self.name)
        log = context.log(self.name)
        with context.console.bar("evaluated", stage.missing) as bar:

            def count() -> None:
                bar.update(evaluated(log))

            run_commands(context, stage, count)
            count()
        file = context.run_dir / EVALUATION
        if not file.is_file():
            raise StageError(f"the engine ended without writing {file} (log: {log})")
        result = json.loads(file.read_text())
        now = int(time.time() * 1000)
        values = {
            "eval/loss": result["loss"],
            "eval/base_loss": result["base_loss"],
            "eval/gain": result["base_loss"] - result["loss"],
        }
        # MLflow draws metrics that have only step 0 as bars, otherwise as curves of one point.
        context.writer.log_points([Point(key, value, 0, now) for key, value in values.items()])
        which = "held-out" if context.inputs.selection.has_held_out else "training"
        context.writer.set_tags({"eval.items": f"{result['items']} {which} items"})


def evaluated(log: Path) -> int:
    """Return the number of items that the engine has reported as evaluated."""
    if not log.is_file():
        return 0
    numbers = re.findall(rb"^evaluated (\d+)/", log.read_bytes(), re.MULTILINE)
    return int(numbers[-1]) if numbers else 0


EVALUATE = Evaluate()
