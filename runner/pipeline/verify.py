"""A plan that counts on nothing in the cache but what is there and as it was committed."""

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

# Reading less than this is done before a bar could be read.
_BAR_MIN_BYTES = 2e9

_WHAT = {"media": "unpacked media", "latents": "latents", "text": "encoded captions"}
_WHY = {"damaged": "damaged in the cache", "unchecked": "cached without a checksum"}


@dataclass(frozen=True)
class EntryFault:
    """An entry that can't be counted on, the stage that wants it, and why."""

    stage: StagePlan
    entry: CacheEntry
    fault: Fault


@dataclass(frozen=True)
class VerifiedPlan:
    """A plan whose finished work has no fault, what it is made from, and what was found."""

    inputs: Inputs
    plan: Plan
    found: tuple[EntryFault, ...]


def plan_with_valid_cache(
    inputs: Inputs,
    make_plan: Callable[[Inputs], Plan],
    faults: Callable[[Collection[str]], dict[str, Fault]],
    plan: Plan | None = None,
) -> VerifiedPlan:
    """``plan``, or the first that counts on just what is there.

    ``faults`` tells which of the entries (``shelf/name``) that a plan counts on are wrong. A plan
    made without those may count on others, which are then looked at too.
    """
    found: dict[str, EntryFault] = {}
    while True:
        if plan is None:
            plan = make_plan(inputs)
        wanted = {
            entry.full_key: (stage, entry) for stage in plan.stages for entry in stage.entries
        }
        wrong = faults(wanted)
        found |= {one: EntryFault(*wanted[one], fault) for one, fault in wrong.items()}
        there = inputs.cached.union(wanted).difference(wrong)
        if there == inputs.cached:
            return VerifiedPlan(inputs, plan, tuple(found.values()))
        # Something was lost, or another run has made what this one was to make.
        inputs, plan = replace(inputs, cached=there), None


def check_all_bytes(
    store: SharedCache, full_keys: Collection[str], console: Console
) -> dict[str, Fault]:
    """:meth:`Store.faults`, bytes and all, with a bar when that takes a while."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def progress(done: int, total: int) -> None:
            if total >= _BAR_MIN_BYTES and not bars:
                bar = console.bar("cache checked", total, in_bytes=True)
                bars.append(stack.enter_context(bar))
            for bar in bars:
                bar.update(done)

        return store.faults(full_keys, read=True, progress=progress)


def notices(found: Sequence[EntryFault]) -> list[str]:
    """A line for each kind of fault on each shelf."""
    lines: list[str] = []
    for namespace, what in _WHAT.items():
        for wanted, why in _WHY.items():
            those = [
                one for one in found if (one.entry.namespace, one.fault) == (namespace, wanted)
            ]
            if not those:
                continue
            names = sorted(PurePosixPath(one.entry.links[0]).name for one in those)
            skipped = any(one.stage.state == "skipped" for one in those)
            fate = "left out, as the stage is skipped" if skipped else "made again"
            was, is_ = ("was", "is") if len(names) == 1 else ("were", "are")
            lines.append(
                f"{len(names)} of the {what} {was} {why} and {is_} {fate}: {named(names)}."
            )
    return lines


def new_use_lease(inputs: Inputs, plan: Plan, run_dir: Path) -> UseLease:
    """The record of what a run uses, holding nothing yet."""
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
