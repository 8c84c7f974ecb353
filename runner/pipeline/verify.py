"""A plan that counts on nothing in the cache but what is there and as it was committed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path, PurePath, PurePosixPath

from runner.config.schema import RunConfig
from runner.core.console import Bar, Console
from runner.core.text import named
from runner.engines.base import Engine
from runner.pipeline.model import Entry, Facts, Plan
from runner.pipeline.plan import make_plan
from runner.storage.leases import Ledger, Use
from runner.storage.store import Fault, Store

# Reading less than this is done before a bar could be read.
_SHOWN_BYTES = 2e9

_WHAT = {"media": "unpacked media", "latents": "latents", "text": "encoded captions"}
_WHY = {"damaged": "damaged in the cache", "unchecked": "cached without a checksum"}

# What was found wrong, by what the entry is called.
Found = dict[str, tuple[Entry, Fault]]


def settled(
    config: RunConfig,
    facts: Facts,
    engine: Engine,
    faults: Callable[[Collection[str]], dict[str, Fault]],
) -> tuple[Facts, Plan, Found]:
    """A plan whose finished work has no fault; the facts it is made of, and what was found.

    ``faults`` tells which of the entries (``shelf/name``) that a plan counts on are wrong. A plan
    made without those may count on others, which are then looked at too.
    """
    found: Found = {}
    while True:
        plan = make_plan(config, facts, engine)
        entries = {entry.stored: entry for entry in plan.entries}
        wrong = faults(entries)
        found |= {one: (entries[one], fault) for one, fault in wrong.items()}
        if not wrong.keys() & facts.cached:
            return facts, plan, found
        facts = replace(facts, cached=facts.cached - wrong.keys())


def read_through(store: Store, stored: Collection[str], console: Console) -> dict[str, Fault]:
    """:meth:`Store.faults`, bytes and all, with a bar when that takes a while."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def progress(done: int, total: int) -> None:
            if total >= _SHOWN_BYTES and not bars:
                bar = console.bar("cache checked", total, in_bytes=True)
                bars.append(stack.enter_context(bar))
            for bar in bars:
                bar.update(done)

        return store.faults(stored, read=True, progress=progress)


def notices(found: Found, skipped: Collection[str]) -> list[str]:
    """A line for each kind of fault on each shelf; ``skipped`` are the stages that make nothing."""
    lines: list[str] = []
    for shelf, what in _WHAT.items():
        stage = "dataset" if shelf == "media" else shelf
        fate = "left out, as the stage is skipped" if stage in skipped else "made again"
        for wanted, why in _WHY.items():
            names = sorted(
                PurePosixPath(entry.links[0]).name
                for entry, fault in found.values()
                if (entry.shelf, fault) == (shelf, wanted)
            )
            was, is_ = ("was", "is") if len(names) == 1 else ("were", "are")
            if names:
                lines.append(
                    f"{len(names)} of the {what} {was} {why} and {is_} {fate}: {named(names)}."
                )
    return lines


def use_of(facts: Facts, plan: Plan, run_dir: Path) -> Use:
    """The record of what a run uses, holding nothing yet."""
    root = facts.root / "cache"
    paths = [source.path for source in facts.sources]
    names = (
        "sample" if source.options.kind == "sample" else PurePath(source.path).name
        for source in facts.sources
    )
    dataset = {
        "name": " + ".join(names),
        "paths": paths,
        "items": len(facts.selection.items),
        "fingerprint": plan.fingerprint,
    }
    weights = (
        Path(path).relative_to(root).parts[:2]
        for path in asdict(facts.weights.paths).values()
        if path and Path(path).is_relative_to(root)
    )
    run = run_dir.relative_to(facts.root).as_posix()
    always = {"weights/checked", *("/".join(parts) for parts in weights)}
    return Use(Ledger(root), run, dataset, always)
