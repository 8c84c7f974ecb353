"""musubi-tuner's rules that need the data or the card: told in the plan, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

from runner.errors import UserError


def plan(*overrides: str, items: list[Any]) -> Any:
    config = compose("memory=24gb", *overrides)
    return plan_of(config, fake_facts(config, items))


PICTURES = [fake_item("a.jpg"), fake_item("b.jpg")]
CLIPS = [*PICTURES, fake_item("clip.mp4")]


# musubi caches clips in buckets whatever the flags say, and batches them by the flags.
def test_batches_of_mixed_size_are_refused() -> None:
    with pytest.raises(UserError) as error:
        plan("dataset.batch_size=2", "dataset.enable_bucket=false", items=CLIPS)
    assert str(error.value) == (
        "dataset.batch_size=2 with clips would mix sizes in a batch: take "
        "dataset.enable_bucket=true, or dataset.batch_size=1."
    )
    source = "dataset.sources=[{path: a, batch_size: 2, bucket_no_upscale: true}]"
    with pytest.raises(UserError, match=r"dataset.sources\[0\].bucket_no_upscale=false"):
        plan(source, items=CLIPS)
    plan("dataset.batch_size=2", "dataset.enable_bucket=false", items=PICTURES)
    plan("dataset.enable_bucket=false", items=CLIPS)
    plan("dataset.batch_size=2", items=CLIPS)


# A warm-up longer than the run is an error where musubi ends with one, else a notice.
def test_warmup_longer_than_the_run() -> None:
    steps = ("training.max_steps=20", "scheduler.warmup_steps=30")
    with pytest.raises(UserError) as error:
        plan("scheduler=rex", *steps, items=PICTURES)
    assert str(error.value) == (
        "scheduler.warmup_steps=30 must not exceed the run's 20 steps (rex)."
    )
    told = plan("scheduler=cosine", *steps, items=PICTURES).notices
    line = (
        "scheduler.warmup_steps=30 is not below the run's 20 steps: the learning rate is never "
        "reached."
    )
    assert line in told
    assert line not in plan("scheduler=cosine", "training.max_steps=31", items=PICTURES).notices


# LoHa and LoKr take a dropout and never use it.
def test_dropout_without_effect_is_told() -> None:
    line = (
        "network.dropout does nothing with network=loha; network.args.rank_dropout and "
        "network.args.module_dropout do."
    )
    assert line in plan("network=loha", "network.dropout=0.1", items=PICTURES).notices
    lora = plan("network=lora", "network.dropout=0.1", items=PICTURES).notices
    assert not any("network.dropout" in notice for notice in lora)
