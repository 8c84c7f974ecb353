"""``experiment=original``: the commands of the script that the runner grew out of, paths aside."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of
from plan_text import difference
from test_musubi_options import of_musubi, script_arguments

from runner.formats.trainer_options import LATENTS, TEXT, TRAIN, options, parse
from runner.pipeline.model import Plan

MEDIA = [fake_item("clip.mp4")]

# The script's command lines, with P for every path.
LATENTS_LINE = "--dataset_config P --vae P --vae_sample_size 128"
TEXT_LINE = "--dataset_config P --text_encoder P --byt5 P --batch_size 4 --fp8_vl"
TRAIN_LINE = """
    --dit P --vae P --text_encoder P --byt5 P --dataset_config P --task t2v --sdpa
    --mixed_precision bf16 --timestep_sampling shift --weighting_scheme none
    --discrete_flow_shift 2.0 --optimizer_type adamw8bit --learning_rate 1e-4
    --gradient_checkpointing --max_data_loader_n_workers 2 --persistent_data_loader_workers
    --network_module networks.lora_hv_1_5 --network_dim 32 --max_train_epochs 10
    --save_every_n_epochs 1 --seed 42 --output_dir P --output_name lora
"""
PATHS = {
    *("dit", "vae", "text_encoder", "byt5", "image_encoder", "dataset_config"),
    *("output_dir", "logging_dir"),
}


def lines(*overrides: str) -> dict[str, dict[str, Any]]:
    """The options of each musubi command of the recipe, with P for every path."""
    config = compose("experiment=original", *overrides)
    plan = plan_of(config, fake_facts(config, MEDIA))
    assert "train.toml" not in dict(plan.files)
    found: dict[str, dict[str, Any]] = {}
    for name in ("latents", "text", "train"):
        for command in of_musubi(plan.stage(name)):
            script, arguments = script_arguments(command.argv) or ("", [])
            values, problems = parse(script, arguments)
            assert problems == []
            found[script] = {k: "P" if k in PATHS else v for k, v in values.items()}
    # The runner reads its metrics there; the script kept none.
    assert found[TRAIN].pop("logging_dir") == "P"
    return found


def read(script: str, line: str) -> dict[str, Any]:
    values, problems = parse(script, shlex.split(line))
    assert problems == []
    return {k: "P" if k in PATHS else v for k, v in values.items()}


# The recipe gives the script's own options, no more and no fewer, for both tasks and with fp8.
@pytest.mark.parametrize("fp8", ["", "precision=fp8"])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_original_gives_the_scripts_commands(task: str, fp8: str) -> None:
    i2v = task == "i2v"
    train = TRAIN_LINE.replace("t2v", task)
    train += "--image_encoder P " if i2v else ""
    train += "--fp8_base --fp8_scaled --fp8_vl" if fp8 else ""
    assert lines(f"task={task}", *([fp8] if fp8 else [])) == {
        LATENTS: read(LATENTS, LATENTS_LINE + (" --i2v --image_encoder P" if i2v else "")),
        TEXT: read(TEXT, TEXT_LINE),
        TRAIN: read(TRAIN, train),
    }


# What the recipe leaves to musubi-tuner are its defaults for what the config says.
def test_what_is_left_out_is_the_default() -> None:
    config = compose("experiment=original")
    known = options(TRAIN)
    assert config.network.alpha == known["network_alpha"].default
    assert config.training.max_grad_norm == known["max_grad_norm"].default
    assert config.scheduler.name == known["lr_scheduler"].default
    assert config.memory.vae_tile == known["vae_sample_size"].default
    assert config.training.sigmoid_scale == known["sigmoid_scale"].default
    steps = config.training.gradient_accumulation_steps
    assert steps == known["gradient_accumulation_steps"].default


# Options that the script did not have follow its own, so that the recipe can be changed.
def test_other_options_are_passed_too() -> None:
    found = lines("network.rank=8", "training.max_steps=30", "optimizer=adafactor")[TRAIN]
    assert found["network_dim"] == 8
    assert found["max_train_steps"] == 30
    assert "max_train_epochs" not in found
    assert found["optimizer_args"] == [
        "relative_step=False",
        "scale_parameter=False",
        "warmup_init=False",
    ]
    assert lines("training.save_precision=bf16")[TRAIN]["save_precision"] == "bf16"


# With fp8 and for i2v the recipe's commands, which are golden as every choice's, differ as here.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_commands_are_golden(task: str, golden: Callable[[str, str], None]) -> None:
    def planned(*overrides: str) -> Plan:
        config = compose("experiment=original", *overrides)
        return plan_of(config, fake_facts(config, MEDIA))

    plan = planned(f"task={task}", "precision=fp8")
    golden(f"original-{task}.diff", difference(planned(), plan))
