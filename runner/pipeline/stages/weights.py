"""The weights stage: have the model's files on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config.schema import RunConfig
from runner.core.atomic import write_text
from runner.core.errors import StageError
from runner.core.process import last_error, log_lines
from runner.hub.weights import user_hub_cache
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, RunEnvironment, StagePlan
from runner.pipeline.stages.base import Stage, run_commands

if TYPE_CHECKING:
    from runner.hub.fetch import FetchedFile


class Weights(Stage):
    name = "weights"
    refreshes_plan = True

    def refusal(self, config: RunConfig, environment: RunEnvironment) -> str | None:
        if self.name in config.stages.skip and not environment.weights.present:
            return "stages.skip=[weights], but the weights are not all on this machine yet."
        return None

    def plan(self, planning: Planning) -> StagePlan:
        weights = planning.inputs.weights
        forced = weights.requests and self.name in planning.inputs.config.stages.force
        done = weights.present and weights.checked and not forced
        return StagePlan(
            self.name,
            weights.summary,
            "done" if done else "to run",
            commands=weights.commands,
            outputs=(weights.paths.transformer,),
        )

    def run(self, context: Context) -> None:
        """Make or fetch what is missing, and write what was found into ``weights.json``.

        Raises :class:`StageError` when that fails or leaves the weights incomplete.
        """
        from runner.hub.fetch import recorded
        from runner.hub.progress import Follower

        stage, log = context.plan.stage(self.name), context.log(self.name)
        if stage.to_run:
            place = context.run_dir / "staging" / "weights.jsonl"
            with Follower(place, context.console) as follower:
                run_commands(
                    context, stage, follower.update, variables=follower.variables, explain=_why
                )
        weights = context.refresh_weights() if stage.to_run else context.inputs.weights
        found = recorded(weights.requests, user_hub_cache(context.inputs.root))
        if not weights.present or found is None:
            raise StageError(f"the weights are still incomplete: start again, or see {log}")
        if found:
            write_text(context.run_dir / "weights.json", weights_json(found))
            commits = {file.repository: file.commit for file in found}
            context.writer.set_tags({f"weights.{name}": commit for name, commit in commits.items()})


def _why(log: Path) -> str:
    """Why fetching failed: the command's own line, as long as it is."""
    last = (log_lines(log) or [""])[-1]
    return last.removeprefix("error: ") if last.startswith("error: ") else last_error(log)


def weights_json(found: Sequence[FetchedFile]) -> str:
    """What a run was trained on, and the overrides that ask for just that again."""
    again = sorted({f"{file.option}={file.commit}" for file in found})
    files = [
        {
            "repository": file.repository,
            "revision": file.revision,
            "commit": file.commit,
            "file": file.file,
            "size": file.size,
            "sha256": file.sha256,
        }
        for file in found
    ]
    return json.dumps({"overrides": again, "files": files}, indent=1) + "\n"


WEIGHTS = Weights()
