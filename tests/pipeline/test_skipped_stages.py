"""A plan with skipped stages is refused when a training would have fewer samples by it."""

from __future__ import annotations

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

from runner.core.errors import UserError
from runner.pipeline.model import Plan

TINY = ["engine=diffusers", "model=tiny", "memory=cpu", "optimizer=adamw", "precision=fp32"]
ITEMS = [fake_item(f"{n}.jpg") for n in range(20)]


def plan(*overrides: str, cached: frozenset[str] = frozenset(), digests: bool = True) -> Plan:
    config = compose(*TINY, "dataset.validation_fraction=0.3", *overrides)
    facts = fake_facts(config, ITEMS, cached=cached, digests=digests)
    made: Plan = plan_of(config, facts)
    return made


# What is cached is looked for under names that only the weights give, so that a plan made before
# they are there is not refused; nor is one that trains nothing.
def test_a_skipped_stage_without_weights_or_training() -> None:
    assert plan("stages.skip=[text]", digests=False).stage("text").state == "skipped"
    assert plan("stages.skip=[latents,text,train]").stage("text").missing == 20
    with pytest.raises(UserError, match="the encoded captions of 20 of 20 items"):
        plan("stages.skip=[text]")


# Items that are held out are wanted by the evaluation alone.
@pytest.mark.parametrize("stage", ["latents", "text"])
def test_held_out_items_are_wanted_by_the_evaluation(stage: str) -> None:
    entries = plan().stage(stage).entries
    cached = frozenset(e.stored for e in entries if "-held-out/" not in e.links[0])
    assert 0 < len(cached) < 20
    plan(f"stages.skip=[{stage},evaluate]", cached=cached)
    with pytest.raises(UserError, match=f"of {20 - len(cached)} of 20 items"):
        plan(f"stages.skip=[{stage}]", cached=cached)
