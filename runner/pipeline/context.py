"""The objects that the stages of one run work with."""

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
    """A run in progress: its folder, its current plan, and where it reports.

    Attributes:
        make_plan: makes a new plan from changed inputs.
        launched: the commands started so far, in order, for each stage.
    """

    inputs: Inputs
    engine: Engine
    run_dir: Path
    cache: SharedCache
    console: Console
    writer: Writer
    plan: Plan
    use_lease: UseLease
    make_plan: Callable[[Inputs], Plan]
    launched: dict[str, list[Command]] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)
    _stale: bool = False

    def refresh_plan(self) -> Plan:
        """Verify the entries that the plan needs, and plan again if something changed.

        The entries are leased before they are verified, so that they cannot be pruned.
        """

        def faults(full_keys: Collection[str]) -> dict[str, Fault]:
            self.use_lease.hold(full_keys)
            return verify.check_all_bytes(self.cache, full_keys, self.console)

        known = None if self._stale else self.plan
        verified = verify.plan_with_valid_cache(self.inputs, self.make_plan, faults, known)
        self.inputs, self.plan, self._stale = verified.inputs, verified.plan, False
        new = [fault for fault in verified.faults if fault.entry.full_key not in self._reported]
        for line in verify.notices(new):
            self.console.notice(line)
        self._reported |= {fault.entry.full_key for fault in new if fault.fault != "missing"}
        return self.plan

    def refresh_weights(self) -> LocatedWeights:
        """Locate the weights again after a download; the next :meth:`refresh_plan` uses them."""
        weights = self.engine.weights(self.inputs.config, self.inputs.root)
        if weights != self.inputs.weights:
            # Cache keys depend on the weights, and other runs may have made entries meanwhile.
            self.inputs = replace(self.inputs, weights=weights, cached=self.cache.full_keys())
            self._stale = True
        return weights

    def mark_made(self, full_keys: Collection[str]) -> None:
        """Record that these entries (``namespace/key``) now exist; the plan stays valid."""
        self.inputs = replace(self.inputs, cached=self.inputs.cached.union(full_keys))

    def log(self, stage: str) -> Path:
        """Return the path of a stage's log."""
        return self.run_dir / "logs" / f"{stage}.log"
