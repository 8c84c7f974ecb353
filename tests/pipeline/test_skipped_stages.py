"""A training never has fewer samples because stages are skipped: it is refused, or has them all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cache_process import context_of
from conftest import compose, fake_facts, fake_item, plan_of
from other_processes import pictures
from whole_run import Stages, carry_out, weights_there

from runner.core.console import Console
from runner.core.errors import UserError
from runner.pipeline.model import Plan
from runner.storage.shared_cache import SharedCache

if TYPE_CHECKING:
    from runner.pipeline.context import Context

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
    cached = frozenset(e.full_key for e in entries if "-held-out/" not in e.links[0])
    assert 0 < len(cached) < 20
    plan(f"stages.skip=[{stage},evaluate]", cached=cached)
    with pytest.raises(UserError, match=f"of {20 - len(cached)} of 20 items"):
        plan(f"stages.skip=[{stage}]", cached=cached)


# Encoding that is skipped since all is cached still puts what is cached into the run's folder,
# where the training finds all of it, and encodes nothing.
@pytest.mark.parametrize("skipped", ["latents", "text", "latents,text"])
def test_a_skipped_encoding_is_there_for_the_training(tmp_path: Path, skipped: str) -> None:
    media, outputs = pictures(tmp_path / "media", 3), tmp_path / "out"
    weights_there(outputs)
    before = context_of(outputs, media, "engine=diffusers")
    wanted = [e for name in ("latents", "text") for e in before.plan.stage(name).entries]
    assert len(wanted) == 6
    store = SharedCache(outputs / "cache")
    for entry in wanted:
        made = tmp_path / "made"
        made.write_text(entry.full_key)
        store.commit(entry.namespace, entry.key, made, entry.cache_inputs)
    found: dict[str, str] = {}

    def train(context: Context) -> None:
        cache = context.run_dir / "cache"
        found.update(
            (str(file.relative_to(context.run_dir)), file.read_text())
            for file in cache.rglob("*.safetensors")
        )

    stages: Stages = {"train": train, "convert": lambda _: None, "evaluate": lambda _: None}
    console = Console.for_stream(io.StringIO())
    carry_out(console, outputs, media, f"stages.skip=[{skipped}]", stages=stages)
    assert found == {place: entry.full_key for entry in wanted for place in entry.links}
