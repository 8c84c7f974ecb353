"""engine.cache_args: which script gets which argument, and which change the keys of the cache."""

from __future__ import annotations

import pytest
from conftest import compose, fake_facts, fake_item

from runner.engines.registry import engine_named
from runner.formats.trainer_options import LATENTS, TEXT, parse
from runner.pipeline.model import Plan
from runner.pipeline.plan import make_plan

STAGES = {"latents": LATENTS, "text": TEXT}


def planned(*arguments: str) -> Plan:
    """The plan of a clip, encoded with these arguments."""
    config = compose(f"engine.cache_args=[{','.join(arguments)}]", "memory=24gb")
    return make_plan(fake_facts(config, [fake_item("clip.mp4")]), engine_named("musubi"))


def given(plan: Plan, stage: str) -> dict[str, object]:
    """What a stage's script is given."""
    (command,) = plan.stage(stage).commands
    words = list(command.argv)
    values, problems = parse(STAGES[stage], words[words.index("-m") + 2 :])
    assert problems == []
    return values


def keys(plan: Plan, stage: str) -> set[str]:
    return {entry.key for entry in plan.stage(stage).entries}


# Each argument reaches the script that takes it, both if both do; the batch of captions stays the
# runner's own option.
def test_each_script_gets_its_own() -> None:
    plan = planned("--num_workers=3", "--batch_size", "7", "--vae_dtype", "float32")
    latents, text = given(plan, "latents"), given(plan, "text")
    assert (latents["num_workers"], text["num_workers"]) == (3, 3)
    assert (latents["batch_size"], text["batch_size"]) == (7, 4)
    assert latents["vae_dtype"] == "float32"
    assert "vae_dtype" not in text


# What changes the latents changes their keys and not those of captions; what changes only the speed
# changes none.
@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        (("--num_workers", "3", "--batch_size", "2", "--device", "cuda:0"), True),
        (("--disable_cudnn_backend",), True),
        (("--vae_dtype", "float32"), False),
        (("--vae_enable_patch_conv",), False),
    ],
)
def test_keys_have_what_changes_the_result(arguments: tuple[str, ...], same: bool) -> None:
    before, after = planned(), planned(*arguments)
    assert (keys(before, "latents") == keys(after, "latents")) is same
    assert keys(before, "text") == keys(after, "text")


# Items of a batch can be attended to one by one, and always are where xformers requires it.
def test_attention_is_split_when_asked() -> None:
    def split(*overrides: str) -> bool:
        config = compose("memory=24gb", *overrides)
        plan = make_plan(fake_facts(config, [fake_item("clip.mp4")]), engine_named("musubi"))
        return "split_attn = true" in dict(plan.files)["train.toml"]

    assert not split()
    assert split("training.split_attention=true")
    assert split("training.attention=xformers")
