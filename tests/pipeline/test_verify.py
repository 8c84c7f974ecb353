"""What a run says of faults in the cache, and what it keeps from being deleted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

from runner.formats.train_toml import WeightPaths
from runner.pipeline.model import CacheEntry, StagePlan, State
from runner.pipeline.verify import EntryFault, new_use_lease, notices


# A notice names the namespace of the faulty entries, whose stage makes them again unless skipped;
# what is skipped besides does not matter.
@pytest.mark.parametrize(
    ("namespace", "stage", "others"),
    [
        ("media", "dataset", ["latents", "text"]),
        ("latents", "latents", ["dataset", "text"]),
        ("text", "text", ["dataset", "latents"]),
    ],
)
def test_a_skipped_stage_mends_nothing(namespace: str, stage: str, others: list[str]) -> None:
    entry = CacheEntry("produced", namespace, "ab", {}, ("cache/a.safetensors",))

    def found(*skipped: str) -> list[EntryFault]:
        state: State = "skipped" if stage in skipped else "to run"
        return [EntryFault(StagePlan(stage, "", state), entry, "damaged")]

    (mended,) = notices(found(*others))
    assert mended.endswith("was damaged in the cache and is made again: a.safetensors.")
    (left,) = notices(found(stage))
    assert left.endswith(
        "was damaged in the cache and is left out, as the stage is skipped: a.safetensors."
    )


# A run counts, beside its entries, on the weights that lie in the cache and on the notes of those
# that were checked; weights elsewhere are nobody's to delete.
def test_weights_in_the_cache_are_in_use() -> None:
    config = compose()
    facts = fake_facts(config, [fake_item("a.jpg")])
    assert new_use_lease(facts, plan_of(config, facts), Path("/outputs/runs/x")).always == {
        "weights/checked"
    }
    tiny = "/outputs/cache/weights/tiny-1"
    paths = WeightPaths(f"{tiny}/transformer", f"{tiny}/vae/v", "/elsewhere/text", "", "/hub/image")
    facts = replace(facts, weights=replace(facts.weights, paths=paths))
    use = new_use_lease(facts, plan_of(config, facts), Path("/outputs/runs/x"))
    assert use.always == {"weights/checked", "weights/tiny-1"}
