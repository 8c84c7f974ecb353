"""The weights stage: have the model's files on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner.config.schema import RunConfig
from runner.core.atomic import write_text
from runner.core.errors import StageError
from runner.hub.weights import checked_cache
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, StagePlan, Surroundings
from runner.pipeline.stages.base import Stage, run_commands

if TYPE_CHECKING:
    from runner.hub.fetch import Obtained


class Weights(Stage):
    name = "weights"
    looks = True

    def refusal(self, config: RunConfig, here: Surroundings) -> str | None:
        if self.name in config.stages.skip and not here.weights.present:
            return "stages.skip=[weights], but the weights are not all on this machine yet."
        return None

    def plan(self, planning: Planning) -> StagePlan:
        weights = planning.inputs.weights
        return StagePlan(
            self.name,
            weights.summary,
            "done" if weights.present else "to run",
            commands=weights.commands,
            outputs=(weights.paths.transformer,),
        )

    def run(self, context: Context) -> None:
        """Make or fetch what is missing, and write what was found into ``weights.json``.

        Raises :class:`StageError` when that fails or leaves the weights incomplete.
        """
        if context.inputs.weights.requests:
            self._fetch(context)
        elif not context.inputs.weights.present:
            run_commands(context, context.plan.stage(self.name))
            if not context.look_at_weights().present:
                raise StageError(f"the weights are still incomplete; see {context.log(self.name)}")

    def _fetch(self, context: Context) -> None:
        from runner.hub.fetch import obtain
        from runner.hub.log import hub_log
        from runner.hub.progress import Shown

        inputs = context.inputs
        force = self.name in inputs.config.stages.force
        with hub_log(context.log(self.name)), Shown(context.console) as shown:
            found = obtain(inputs.weights.requests, checked_cache(inputs.root), shown, force=force)
        if not context.look_at_weights().present:
            raise StageError("the weights are incomplete though all was fetched: start again.")
        write_text(context.run_dir / "weights.json", weights_json(found))
        commits = {file.repository: file.commit for file in found}
        context.writer.set_tags({f"weights.{name}": commit for name, commit in commits.items()})


def weights_json(found: Sequence[Obtained]) -> str:
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
