"""Plan only on cache entries that exist and are undamaged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath, PurePosixPath

from runner.core.console import Bar, Console
from runner.core.text import named
from runner.pipeline.model import CacheEntry, Inputs, Plan, StagePlan
from runner.storage.leases import Leases, UseLease
from runner.storage.shared_cache import Fault, SharedCache

# Below this size no progress bar is shown.
_BAR_MIN_BYTES = 2e9

_WHAT = {"media": "unpacked media", "latents": "latents", "text": "encoded captions"}
_WHY = {"damaged": "damaged in the cache", "unchecked": "cached without a checksum"}


@dataclass(frozen=True)
class EntryFault:
    """A faulty entry, the stage that needs it, and the fault."""

    stage: StagePlan
    entry: CacheEntry
    fault: Fault


@dataclass(frozen=True)
class VerifiedPlan:
    """A plan that depends only on valid entries, its inputs, and the faults that were found."""

    inputs: Inputs
    plan: Plan
    faults: tuple[EntryFault, ...]


def plan_with_valid_cache(
    inputs: Inputs,
    make_plan: Callable[[Inputs], Plan],
    faults: Callable[[Collection[str]], dict[str, Fault]],
    plan: Plan | None = None,
) -> VerifiedPlan:
    """Repeat planning until the plan depends only on valid entries.

    A plan made without the faulty entries may need others, which are then checked too.

    Args:
        inputs: the inputs of the plan.
        make_plan: makes a plan from inputs.
        faults: returns the faulty ones among entries, given as ``namespace/key``.
        plan: the plan to begin with; made from ``inputs`` if not given.
    """
    entry_faults: dict[str, EntryFault] = {}
    while True:
        if plan is None:
            plan = make_plan(inputs)
        wanted = {
            entry.full_key: (stage, entry) for stage in plan.stages for entry in stage.entries
        }
        faulty = faults(wanted)
        entry_faults |= {key: EntryFault(*wanted[key], fault) for key, fault in faulty.items()}
        valid = inputs.cached.union(wanted).difference(faulty)
        if valid == inputs.cached:
            return VerifiedPlan(inputs, plan, tuple(entry_faults.values()))
        # An entry is missing or damaged, or another run has made one meanwhile.
        inputs, plan = replace(inputs, cached=valid), None


def check_all_bytes(
    cache: SharedCache, full_keys: Collection[str], console: Console
) -> dict[str, Fault]:
    """Find faulty entries by reading all their bytes, with a progress bar if they are large."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def progress(done: int, total: int) -> None:
            if total >= _BAR_MIN_BYTES and not bars:
                bar = console.bar("cache checked", total, in_bytes=True)
                bars.append(stack.enter_context(bar))
            for bar in bars:
                bar.update(done)

        return cache.faults(full_keys, read=True, progress=progress)


def notices(entry_faults: Sequence[EntryFault]) -> list[str]:
    """Return one line for each fault in each namespace."""
    lines: list[str] = []
    for namespace, what in _WHAT.items():
        for fault, why in _WHY.items():
            faulty = [
                one
                for one in entry_faults
                if (one.entry.namespace, one.fault) == (namespace, fault)
            ]
            if not faulty:
                continue
            names = sorted(PurePosixPath(one.entry.links[0]).name for one in faulty)
            skipped = any(one.stage.state == "skipped" for one in faulty)
            fate = "left out, as the stage is skipped" if skipped else "made again"
            was, is_ = ("was", "is") if len(names) == 1 else ("were", "are")
            lines.append(
                f"{len(names)} of the {what} {was} {why} and {is_} {fate}: {named(names)}."
            )
    return lines


def new_use_lease(inputs: Inputs, plan: Plan, run_dir: Path) -> UseLease:
    """Create the lease for the entries that a run uses; it holds none yet."""
    root = inputs.root / "cache"
    paths = [source.path for source in inputs.sources]
    names = (
        "sample" if source.options.source_kind == "sample" else PurePath(source.path).name
        for source in inputs.sources
    )
    dataset = {
        "name": " + ".join(names),
        "paths": paths,
        "items": len(inputs.selection.items),
        "fingerprint": plan.fingerprint,
    }
    weights = (
        Path(path).relative_to(root).parts[:2]
        for path in asdict(inputs.weights.paths).values()
        if path and Path(path).is_relative_to(root)
    )
    run = run_dir.relative_to(inputs.root).as_posix()
    always = {"weights/checked", *("/".join(parts) for parts in weights)}
    return UseLease(Leases(root), run, dataset, always)
