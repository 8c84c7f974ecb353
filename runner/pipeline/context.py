"""What the stages of one run work with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.core.command import Command
from runner.core.console import Console
from runner.engines.base import Engine
from runner.hub.weights import LocatedWeights
from runner.pipeline import verify
from runner.pipeline.model import Inputs, Plan
from runner.storage.leases import UseLease
from runner.storage.shared_cache import Fault, SharedCache
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
    store: SharedCache
    console: Console
    writer: Writer
    plan: Plan
    use_lease: UseLease
    make_plan: Callable[[Inputs], Plan]
    launched: dict[str, list[Command]] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)
    _stale: bool = False

    def refresh_plan(self) -> Plan:
        """Look at what the plan counts on; where that changed, the plan is made anew.

        What the plan counts on is kept from being pruned before it is looked at.
        """

        def faults(full_key: Collection[str]) -> dict[str, Fault]:
            self.use_lease.hold(full_key)
            return verify.check_all_bytes(self.store, full_key, self.console)

        known = None if self._stale else self.plan
        verified = verify.plan_with_valid_cache(self.inputs, self.make_plan, faults, known)
        self.inputs, self.plan, self._stale = verified.inputs, verified.plan, False
        new = [one for one in verified.found if one.entry.full_key not in self._reported]
        for line in verify.notices(new):
            self.console.notice(line)
        self._reported |= {one.entry.full_key for one in new if one.fault != "absent"}
        return self.plan

    def refresh_weights(self) -> LocatedWeights:
        """Look where the weights are, after some were brought; the next look plans with them."""
        weights = self.engine.weights(self.inputs.config, self.inputs.root)
        if weights != self.inputs.weights:
            # What entries are called is known only now, and others may have made some meanwhile.
            self.inputs = replace(self.inputs, weights=weights, cached=self.store.names())
            self._stale = True
        return weights

    def mark_made(self, full_key: Collection[str]) -> None:
        """These entries (``shelf/name``) were made as the plan wants them, which so stays true."""
        self.inputs = replace(self.inputs, cached=self.inputs.cached.union(full_key))

    def log(self, stage: str) -> Path:
        """The log of one stage."""
        return self.run_dir / "logs" / f"{stage}.log"
