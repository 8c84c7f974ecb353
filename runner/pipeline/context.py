"""What the stages of one run work with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.core.command import Command
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

    ``make_plan`` makes the plan of other inputs. ``launched`` are the commands that were started of
    each stage, in their order.
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
    launched: dict[str, list[Command]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _stale: bool = False

    def look(self) -> Plan:
        """Look at what the plan counts on; where that changed, the plan is made anew.

        What the plan counts on is kept from being pruned before it is looked at.
        """

        def faults(stored: Collection[str]) -> dict[str, Fault]:
            self.use.hold(stored)
            return verify.read_through(self.store, stored, self.console)

        known = None if self._stale else self.plan
        settled = verify.settle(self.inputs, self.make_plan, faults, known)
        self.inputs, self.plan, self._stale = settled.inputs, settled.plan, False
        new = [one for one in settled.found if one.entry.stored not in self._told]
        for line in verify.notices(new):
            self.console.notice(line)
        self._told |= {one.entry.stored for one in new if one.fault != "absent"}
        return self.plan

    def look_at_weights(self) -> WeightFacts:
        """Look where the weights are, after some were brought; the next look plans with them."""
        weights = self.engine.weights(self.inputs.config, self.inputs.root)
        if weights != self.inputs.weights:
            # What entries are called is known only now, and others may have made some meanwhile.
            self.inputs = replace(self.inputs, weights=weights, cached=self.store.names())
            self._stale = True
        return weights

    def made(self, stored: Collection[str]) -> None:
        """These entries (``shelf/name``) were made as the plan wants them, which so stays true."""
        self.inputs = replace(self.inputs, cached=self.inputs.cached.union(stored))

    def log(self, stage: str) -> Path:
        """The log of one stage."""
        return self.run_dir / "logs" / f"{stage}.log"
