"""musubi-tuner's rules that depend on the data or the GPU, checked before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

from runner.core.errors import UserError
from runner.engines.base import Gpu


def plan(*overrides: str, items: list[Any]) -> Any:
    config = compose("memory=24gb", *overrides)
    return plan_of(config, fake_facts(config, items))


SMALL = Gpu("small GPU", 12.0, (8, 9))
LARGE = Gpu("large GPU", 80.0, (9, 0))


def plan_on(gpu: Gpu, *overrides: str) -> Any:
    config = compose(*overrides)
    return plan_of(config, fake_facts(config, PICTURES, gpu=gpu))


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
    lines = plan("scheduler=cosine", *steps, items=PICTURES).notices
    line = (
        "scheduler.warmup_steps=30 is not below the run's 20 steps: the learning rate is never "
        "reached."
    )
    assert line in lines
    assert line not in plan("scheduler=cosine", "training.max_steps=31", items=PICTURES).notices


# A warm-up of just the run's length reaches the rate after the last step: a notice; one step less
# is none. rex ends with neither.
def test_warmup_as_long_as_the_run() -> None:
    def lines(scheduler: str, steps: int) -> bool:
        given = (f"scheduler={scheduler}", f"training.max_steps={steps}")
        notices = plan(*given, "scheduler.warmup_steps=30", items=PICTURES).notices
        return any("the learning rate is never reached" in notice for notice in notices)

    assert lines("cosine", 30)
    assert not lines("cosine", 31)
    assert lines("rex", 30)


# LoHa and LoKr take a dropout and never use it.
def test_dropout_without_effect_is_reported() -> None:
    line = (
        "network.dropout does nothing with network=loha; network.args.rank_dropout and "
        "network.args.module_dropout do."
    )
    assert line in plan("network=loha", "network.dropout=0.1", items=PICTURES).notices
    lora = plan("network=lora", "network.dropout=0.1", items=PICTURES).notices
    assert not any("network.dropout" in notice for notice in lora)


# memory=auto is chosen by the GPU. The options of its tier are checked by the same rules as given
# ones; otherwise musubi-tuner would reject them once everything is cached.
def test_the_tier_of_the_gpu_is_held_to_the_rules() -> None:
    with pytest.raises(UserError) as error:
        plan_on(SMALL, "memory.checkpointing=none")
    assert str(error.value) == (
        "memory.h2d_only=true with block swap (memory=12gb) needs memory.checkpointing=full or "
        "offload, not none: take one of them, or memory.h2d_only=false."
    )
    plan_on(SMALL, "memory.checkpointing=none", "memory.blocks_to_swap=0")
    plan_on(SMALL, "memory.checkpointing=none", "memory.h2d_only=false")
    plan_on(LARGE, "memory.checkpointing=none")


# The buffers of one-way swapping are useful only where the GPU's tier swaps one way.
def test_swap_buffers_are_judged_by_the_tier_of_the_card() -> None:
    ring = "engine.extra_args=[--block_swap_ring_size,3]"
    plan_on(SMALL, ring)
    with pytest.raises(UserError, match="--block_swap_ring_size does nothing in memory=80gb"):
        plan_on(LARGE, ring)


# musubi reads the number of cycles for both schedules that have any.
@pytest.mark.parametrize("name", ["cosine_with_restarts", "cosine_with_min_lr"])
def test_the_number_of_cycles_is_passed_on(name: str) -> None:
    made = plan(f"scheduler={name}", "scheduler.num_cycles=5", items=PICTURES)
    assert "lr_scheduler_num_cycles = 5\n" in dict(made.files)["train.toml"]


# Adafactor that sets its own rate takes no notice of the learning rate: that is said.
def test_a_learning_rate_without_effect_is_reported() -> None:
    line = (
        "optimizer.learning_rate=0.0001 does nothing: Adafactor sets its own rate, unless "
        "optimizer.args.relative_step=false and optimizer.args.warmup_init=false."
    )
    assert line in plan("optimizer=custom", "optimizer.type=adafactor", items=PICTURES).notices
    for setting in ("relative_step", "warmup_init"):
        override = f"optimizer.args.{setting}=true"
        assert line in plan("optimizer=adafactor", override, items=PICTURES).notices
    assert line not in plan("optimizer=adafactor", items=PICTURES).notices
