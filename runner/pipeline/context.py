"""What the stages of one run work with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.core.console import Console
from runner.engines.base import Engine
from runner.hub.weights import WeightFacts
from runner.pipeline import verify
from runner.pipeline.model import Inputs, Plan
from runner.storage.leases import Use
from runner.storage.store import Fault, Store
from runner.tracking.mlflow_run import Writer


@dataclass
class Context:
    """A run at work: its folder, its plan as of now, and where it writes what happens.

    ``make_plan`` makes the plan of other inputs.
    """

    inputs: Inputs
    engine: Engine
    run_dir: Path
    store: Store
    console: Console
    writer: Writer
    plan: Plan
    use: Use
    make_plan: Callable[[Inputs], Plan]
    _told: set[str] = field(default_factory=set)

    def look(self) -> Plan:
        """Look at what the plan counts on; where that changed, the plan is made anew.

        What the plan counts on is kept from being pruned before it is looked at. What has come
        since it was made is taken as there, and needs no other plan.
        """

        def faults(stored: Collection[str]) -> dict[str, Fault]:
            self.use.hold(stored)
            return verify.read_through(self.store, stored, self.console)

        settled = verify.settle(self.inputs, self.make_plan, faults, self.plan)
        self.inputs, self.plan = settled.inputs, settled.plan
        new = [one for one in settled.found if one.entry.stored not in self._told]
        for line in verify.notices(new):
            self.console.notice(line)
        self._told |= {one.entry.stored for one in new if one.fault != "absent"}
        return self.plan

    def look_at_weights(self) -> WeightFacts:
        """Look where the weights are, after some were brought; the plan follows."""
        weights = self.engine.weights(self.inputs.config, self.inputs.root)
        if weights != self.inputs.weights:
            self.inputs = replace(self.inputs, weights=weights)
            self.plan = self.make_plan(self.inputs)
        return weights

    def log(self, stage: str) -> Path:
        """The log of one stage."""
        return self.run_dir / "logs" / f"{stage}.log"
