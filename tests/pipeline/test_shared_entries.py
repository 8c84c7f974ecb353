"""One cache for both engines: which latents and captions serve whom, and under which keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item
from third_engine import ThirdEngine

from runner.engines.registry import engine_named
from runner.pipeline.digests import fingerprint
from runner.pipeline.model import Plan
from runner.pipeline.plan import make_plan

TINY = ("model=tiny", "optimizer=adamw", "precision=fp32", "memory=cpu")
CLIP = fake_item("clip.mp4")
ENGINES = ("musubi", "diffusers")

# The full keys of a clip's latents (13 and 25 frames, i2v) and caption, as version 0.1.0 made them,
# by the engine that encoded.
EARLIER = {
    "musubi": (
        "latents/2a43014f248629cd7dca183ab814d6851fafbd61.safetensors",
        "latents/c38aba219b7637180aabba7186745a4eb159da2d.safetensors",
        "text/e93a7152f9fe283ef28a5e74fce6740d49ebab5a.safetensors",
    ),
    "diffusers": (
        "latents/f1ca4af4089c86f0cfdd581fcc6cd01275fa8f38.safetensors",
        "latents/942c070a843ffbfdd87f234694f4c95435a20dae.safetensors",
        "text/5c0edb5372a4783b446a98c38e7ca1882d51b419.safetensors",
    ),
}


def planned(
    engine: str, *overrides: str, cached: frozenset[str] = frozenset(), **facts: Any
) -> tuple[Plan, str | None]:
    """The plan of a clip and its run's fingerprint."""
    config = compose(f"engine={engine}", *TINY, *overrides)
    inputs = replace(fake_facts(config, [CLIP], cached=cached), **facts)
    plan = make_plan(inputs, engine_named(engine))
    return plan, fingerprint(inputs, plan, engine_named(engine))


def keys(plan: Plan) -> frozenset[str]:
    """The full keys of all latents and captions."""
    return frozenset(e.full_key for s in ("latents", "text") for e in plan.stage(s).entries)


def states(plan: Plan) -> list[tuple[str, int]]:
    """State of both stages, and how many entries they lack."""
    return [(plan.stage(s).state, plan.stage(s).missing) for s in ("latents", "text")]


ALL_DONE = [("done", 0), ("done", 0)]


# What one engine encodes serves the other, for both tasks: their keys are the same ones, and have
# no engine in them.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_engines_have_the_same_keys(task: str) -> None:
    plans = [planned(engine, f"task={task}")[0] for engine in ENGINES]
    assert keys(plans[0]) == keys(plans[1])
    assert not any("engine" in entry.cache_inputs for plan in plans for entry in plan.entries)
    for engine in ENGINES:
        assert states(planned(engine, f"task={task}", cached=keys(plans[0]))[0]) == ALL_DONE


# Who has encoded with an earlier version, on whichever engine, encodes nothing again: the entry is
# used under the key that it has. The fingerprint does not tell who encoded, and is what it was.
@pytest.mark.parametrize("maker", ENGINES)
@pytest.mark.parametrize("user", ENGINES)
def test_earlier_entries_are_used(maker: str, user: str) -> None:
    earlier = frozenset(EARLIER[maker])
    plan, result = planned(user, "task=i2v", cached=earlier)
    assert states(plan) == ALL_DONE
    assert keys(plan) == earlier
    new, same = planned(user, "task=i2v")
    assert result == same
    # An entry of today is preferred, and all that is missing gets the keys of today.
    assert keys(planned(user, "task=i2v", cached=earlier | keys(new))[0]) == keys(new)
    some = planned(user, "task=i2v", cached=frozenset(EARLIER[maker][:1]))[0]
    assert states(some) == [("to run", 1), ("to run", 1)]
    assert keys(some) - earlier < keys(new)
    forced = planned(user, "task=i2v", "stages.force=[latents,text]", cached=earlier)[0]
    assert keys(forced) == keys(new)


# Entries made otherwise stay apart, also those of earlier versions: captions encoded in fp8, which
# serve nobody who did not ask for it, and other tiles, which only whole frames stand in for.
@pytest.mark.parametrize("mark", [{}, {"engine": "musubi"}])
def test_fp8_and_tiles_stay_apart(mark: dict[str, str]) -> None:
    from runner.storage.shared_cache import cache_key

    def made(*overrides: str) -> frozenset[str]:
        plan = planned("musubi", *overrides)[0]
        return frozenset(
            f"{entry.namespace}/{cache_key(entry.cache_inputs | mark)}"
            for stage in ("latents", "text")
            for entry in plan.stage(stage).entries
        )

    fp8, tiles = made("memory.fp8_text_encoder=true"), made("memory.vae_tile=128")
    for engine in ENGINES:
        assert states(planned(engine, cached=fp8)[0]) == [("done", 0), ("to run", 1)]
        assert states(planned(engine, cached=tiles)[0]) == [("to run", 3), ("done", 0)]
        same = planned(engine, "memory.vae_tile=128", cached=tiles)[0]
        whole = planned(engine, "memory.vae_tile=128", cached=made())[0]
        assert states(same) == states(whole) == ALL_DONE
        other = planned(engine, "memory.vae_tile=256", cached=tiles)[0]
        assert states(other) == [("to run", 3), ("done", 0)]
    asked = planned("musubi", "memory.fp8_text_encoder=true", cached=made())[0]
    assert states(asked) == [("done", 0), ("to run", 1)]


# An engine that encodes otherwise keeps its entries to itself, and takes nobody's.
def test_an_engine_can_have_its_own() -> None:
    own = ThirdEngine().own_encoding
    apart = planned("musubi", own_encoding=own)[0]
    shared = planned("musubi")[0]
    assert not keys(apart) & keys(shared)
    assert states(planned("musubi", cached=keys(apart))[0]) == [("to run", 3), ("to run", 1)]
    everything = keys(shared).union(*EARLIER.values())
    assert states(planned("musubi", own_encoding=own, cached=everything)[0])[1] == ("to run", 1)
    assert states(planned("musubi", own_encoding=own, cached=keys(apart))[0]) == ALL_DONE
