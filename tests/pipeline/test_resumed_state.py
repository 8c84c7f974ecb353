"""A state to resume from: what does not fit the run is refused before any work."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import compose, fake_facts, fake_item, plan_of
from omegaconf import OmegaConf
from safetensors.torch import save_file
from state_folders import ONE_MODULE, save_state

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.engines.musubi.engine import MusubiEngine
from runner.engines.musubi.rules import problems
from runner.pipeline.inputs import gather
from runner.pipeline.model import RunEnvironment
from runner.pipeline.option_paths import resolve_paths
from runner.pipeline.resumed_state import state_notices

BASE = (*ONE_MODULE, "network.rank=4", "network.alpha=2", "optimizer.learning_rate=1e-4")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run of ours, in its folder."""
    run = tmp_path_factory.mktemp("run")
    state = run / "checkpoints" / "lora-state"
    save_state(state)
    (run / "run.json").write_text("{}")
    config = compose(*BASE, "optimizer=adamw", "optimizer.args.weight_decay=0.1")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return state


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that was copied out of its run."""
    state = tmp_path_factory.mktemp("copied") / "lora-state"
    save_state(state)
    return state


SAME = (*BASE, "optimizer=adamw", "optimizer.args.weight_decay=0.1")


def resumed(state: Path, *overrides: str) -> RunConfig:
    config = compose(*overrides, f"training.resume_from={state}")
    return resolve_paths(config, MusubiEngine(), Path("/"))


# The run that wrote the state goes on, with the optimizer's class named in either way.
def test_the_same_training_goes_on(recorded: Path) -> None:
    assert list(state_notices(resumed(recorded, *SAME))) == []
    resumed(recorded, *SAME, "optimizer.type=torch.optim.AdamW")


# Whatever the state fixes and the run wants otherwise is named with both values, in one line.
@pytest.mark.parametrize(
    ("change", "theirs", "ours"),
    [
        ("network.rank=8", "network.rank=4", "network.rank=8"),
        ("network.alpha=4", "network.alpha=2", "network.alpha=4"),
        ("network=loha", "network=lora", "network=loha"),
        (
            "network.include=['double_blocks.0.img_attn_k']",
            "1 module (1 of them not this run's)",
            "1 module (network.include, network.exclude)",
        ),
        ("task=i2v", "task=t2v", "task=i2v"),
        ("optimizer.type=SGD", "optimizer.type=adamw", "optimizer.type=SGD"),
        (
            "optimizer.args.weight_decay=0.2",
            "optimizer.args.weight_decay=0.1",
            "optimizer.args.weight_decay=0.2",
        ),
        ("+optimizer.args.eps=1e-6", "optimizer.args.eps=unset", "optimizer.args.eps=1e-06"),
        (
            "optimizer.learning_rate=2e-4",
            "optimizer.learning_rate=0.0001",
            "optimizer.learning_rate=0.0002",
        ),
        (
            "+network.args.loraplus_lr_ratio=4",
            "network.args.loraplus_lr_ratio=unset",
            "network.args.loraplus_lr_ratio=4",
        ),
    ],
)
def test_another_training_is_refused(recorded: Path, change: str, theirs: str, ours: str) -> None:
    with pytest.raises(UserError) as caught:
        resumed(recorded, *SAME, change)
    assert str(caught.value) == (
        f"training.resume_from={recorded} is the state of another training: it has {theirs}; this "
        f"run has {ours}. Give the run what the state has, or start from the LoRA alone "
        "(network.weights), which leaves task, optimizer and rate free."
    )


# Without its run's record, task and optimizer are said to be unknown and not guessed; what the
# state itself says is checked all the same.
def test_a_state_without_its_run(alone: Path) -> None:
    config = resumed(alone, *BASE, "task=i2v")
    notice = (
        "training.resume_from: lora-state lies in no run's folder, and does not itself say its "
        "task and optimizer: they are not checked, and must be this run's."
    )
    assert list(state_notices(config)) == [notice]
    inputs = fake_facts(config, [fake_item("a.mp4")])
    environment = RunEnvironment(
        **{field.name: getattr(inputs, field.name) for field in fields(RunEnvironment)}
    )
    assert notice in plan_of(config, gather(config, environment, inputs.sources)).notices
    for change, words in (
        ("network.rank=8", "it has network.rank=4; this run has network.rank=8."),
        ("optimizer.learning_rate=2e-4", "it has optimizer.learning_rate=0.0001; this"),
        (
            "optimizer.type=schedulefree.AdamWScheduleFree",
            "it has the state of a schedule; this run has optimizer.type=schedulefree.",
        ),
    ):
        with pytest.raises(UserError) as caught:
            resumed(alone, *BASE, change)
        assert words in str(caught.value)


# A schedule that ends with the run would go on from the state's step and reach its end too early:
# it is refused. Those that depend on no number of steps are exact.
@pytest.mark.parametrize(
    ("scheduler", "fits"),
    [
        ("constant", True),
        ("constant_with_warmup", True),
        ("cosine", False),
        ("cosine_with_min_lr", False),
        ("cosine_with_restarts", False),
        ("linear", False),
        ("polynomial", False),
        ("rex", False),
    ],
)
def test_schedules_that_end_are_refused(scheduler: str, fits: bool) -> None:
    lines = list(problems(compose(f"scheduler={scheduler}", "training.resume_from=a")))
    refusal = (
        f"scheduler={scheduler} can't go on with training.resume_from: the state's steps and "
        "this run's would count against this run's number of steps, and reach the schedule's end "
        "too early. Take scheduler=constant, or start from the LoRA alone (network.weights)."
    )
    assert lines == ([] if fits else [refusal])
    assert not list(problems(compose(f"scheduler={scheduler}")))


# A warm-up that the state has behind it does nothing, which is said.
def test_a_warmup_that_is_over_is_a_notice(recorded: Path) -> None:
    warmup = ("scheduler=constant_with_warmup", "scheduler.warmup_steps")
    over = resumed(recorded, *SAME, warmup[0], f"{warmup[1]}=500")
    assert list(state_notices(over)) == [
        "scheduler.warmup_steps=500 does nothing: lora-state is already 500 steps on."
    ]
    assert list(state_notices(resumed(recorded, *SAME, warmup[0], f"{warmup[1]}=501"))) == []


# The state's weights replace those that the run would start from.
def test_weights_to_start_from_do_nothing() -> None:
    config = compose("training.resume_from=a", "network.weights=b.safetensors")
    assert list(problems(config)) == [
        "network.weights does nothing with training.resume_from, whose weights replace it: leave "
        "one of them out."
    ]


# A rex schedule's state can be loaded by its own kind alone: the trainer would fail on it.
def test_a_state_of_rex_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "a-state", lambda_schedule=False)
    with pytest.raises(UserError, match=r"it has the state of a schedule of its own kind \(rex\);"):
        resumed(tmp_path / "a-state", *BASE)
    resumed(tmp_path / "a-state", *BASE, "engine.extra_args=[--lr_scheduler_type,StepLR]")


# A LoKr with a whole second factor is saved with its rank for alpha: the record has the option's.
def test_the_alpha_of_a_lokr_is_its_records(tmp_path: Path, recorded: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded.parent.parent, run)
    state = run / "checkpoints" / "lora-state"
    name = "lora_unet_double_blocks_0_img_attn_q"
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 4), "alpha": torch.tensor(4)}
    tensors = {f"{name}.{leaf}": tensor for leaf, tensor in factors.items()}
    save_file(tensors, state / "model.safetensors")
    resumed(state, *SAME, "network=lokr", "network.rank=4")
    with pytest.raises(UserError, match=r"network\.alpha=2; this run has network\.alpha=4\."):
        resumed(state, *SAME, "network=lokr", "network.rank=4", "network.alpha=4")


# A folder that is in the place of a run, but has no record of one, says nothing of the state.
def test_another_programs_config_is_no_record(tmp_path: Path) -> None:
    state = tmp_path / "checkpoints" / "lora-state"
    save_state(state)
    (tmp_path / "config.yaml").write_text("task: {name: i2v}")
    assert len(list(state_notices(resumed(state, *BASE)))) == 1
