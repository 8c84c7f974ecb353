"""The weights stage: fetch or create the model's files, and hash those of this computer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config.schema import RunConfig
from runner.core.atomic import write_text
from runner.core.errors import StageError
from runner.core.process import last_error, log_lines
from runner.hub.local_files import LocalFile
from runner.hub.weights import user_hub_cache
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, RunEnvironment, StagePlan
from runner.pipeline.stages.base import Stage, run_commands

if TYPE_CHECKING:
    from runner.hub.fetch import FetchedFile


class Weights(Stage):
    """The stage that fetches missing weights, hashes local ones, and writes ``weights.json``."""

    name = "weights"
    refreshes_plan = True

    def refusal(self, config: RunConfig, environment: RunEnvironment) -> str | None:
        """Return a reason if the stage is skipped but weights are missing; pure."""
        weights = environment.weights
        if self.name not in config.stages.skip or weights.present:
            return None
        if unknown := [f"model.{file.part}" for file in weights.local if file.sha256 is None]:
            return f"stages.skip=[weights], but {', '.join(unknown)} must be hashed once."
        return "stages.skip=[weights], but some weights are not on this computer yet."

    def plan(self, planning: Planning) -> StagePlan:
        """Plan the download or creation of missing weights; pure."""
        weights = planning.inputs.weights
        # All but random weights have requests, those of the tokenizers.
        forced = weights.requests and self.name in planning.inputs.config.stages.force
        done = weights.present and weights.checked and not forced
        return StagePlan(
            self.name,
            weights.summary,
            "done" if done else "to run",
            commands=weights.commands,
            outputs=(weights.paths.transformer,),
            notices=weights.notices,
        )

    def run(self, context: Context) -> None:
        """Fetch, create or hash weights, and list them in ``weights.json``.

        Raises:
            StageError: that failed, or the weights are still incomplete.
        """
        from runner.hub.fetch import recorded
        from runner.hub.progress import Follower

        stage, log = context.plan.stage(self.name), context.log(self.name)
        if stage.to_run:
            progress_file = context.run_dir / "staging" / "weights.jsonl"
            with Follower(progress_file, context.console) as follower:
                run_commands(
                    context, stage, follower.update, variables=follower.variables, explain=_explain
                )
        weights = context.refresh_weights() if stage.to_run else context.inputs.weights
        fetched = recorded(weights.requests, user_hub_cache(context.inputs.root))
        if not weights.present or fetched is None:
            raise StageError(f"the weights are still incomplete: start again, or see {log}")
        if fetched:
            write_text(context.run_dir / "weights.json", weights_json(fetched, weights.local))
            tags = {f"weights.{file.repository}": file.commit for file in fetched}
            for file in weights.local:
                tags[f"weights.{file.part}"] = f"local {file.sha256} {file.path}"
            context.writer.set_tags(tags)


def _explain(log: Path, code: int) -> str:
    """Explain why fetching failed: the command's own error line, unshortened."""
    last = (log_lines(log) or [""])[-1]
    return last.removeprefix("error: ") if last.startswith("error: ") else last_error(log)


def weights_json(fetched: Sequence[FetchedFile], local: Sequence[LocalFile]) -> str:
    """List the files that a run was trained on, and the overrides that select the same ones."""
    again = {f"{file.option}={file.commit}" for file in fetched}
    again |= {f"model.{file.part}={file.path}" for file in local}
    files: list[dict[str, str | int | None]] = [
        {
            "repository": file.repository,
            "revision": file.revision,
            "commit": file.commit,
            "file": file.file,
            "size": file.size,
            "sha256": file.sha256,
        }
        for file in fetched
    ]
    files += [file.record() for file in local]
    return json.dumps({"overrides": sorted(again), "files": files}, indent=1) + "\n"


WEIGHTS = Weights()
