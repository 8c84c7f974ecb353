"""The trainer from files to files: batches, determinism, optimizers, checkpoints, metrics."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import converted
from safetensors import safe_open
from torch import Tensor
from training_run import inside, write_item, write_run

from runner.core.errors import StageError, UserError
from runner.engines.diffusers import (
    checkpoints,
    data,
    flow,
    make_weights,
    networks,
    optimizers,
    options,
    sampling,
    train,
)
from runner.formats import lora


def run(folder: Path) -> dict[str, Tensor]:
    """Train in the folder; returns the final LoRA's tensors."""
    with inside(folder):
        train.main(["--config_file", "train.toml"])
    return read(folder / "checkpoints" / "lora.safetensors")[0]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def trained(folder: Path) -> train.Trainer:
    """Train in the folder; returns the trainer as it is then."""
    with inside(folder):
        chosen = options.read("train.toml")
        datasets = data.scan(chosen.dataset_config, chosen.task)
        assert chosen.seed is not None
        trainer = train.Trainer(chosen, datasets, chosen.seed)
        trainer.train()
    return trainer


def one_step(folder: Path, **changed: Any) -> dict[str, Tensor]:
    """The up matrices, which begin at zero, after one step of gradient descent at the rate 1.

    They are then the gradient itself.
    """
    values: dict[str, Any] = {
        "optimizer_type": "torch.optim.SGD",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "max_train_epochs": None,
        "max_train_steps": 1,
        **changed,
    }
    return {key: tensor for key, tensor in run(write_run(folder, **values)).items() if UP in key}


def norm(tensors: dict[str, Tensor]) -> float:
    """The length of all tensors together."""
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


UP = "lora_up"


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar under tensorboard/network_train, by name: steps and values."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    (file,) = (folder / "tensorboard" / "network_train").iterdir()
    found: dict[str, list[tuple[int, float]]] = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            number = tensor_util.make_ndarray(value.tensor).item()
            found.setdefault(value.tag, []).append((event.step, number))
    return found


# The same seed gives the same LoRA tensors, bit for bit; another seed gives others.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_same_seed_same_tensors(tmp_path: Path, task: str) -> None:
    first = run(write_run(tmp_path / "a", task=task, network_dropout=0.1))
    assert equal(first, run(write_run(tmp_path / "b", task=task, network_dropout=0.1)))
    assert not equal(first, run(write_run(tmp_path / "c", task=task, seed=43)))
    # It is a trained LoRA: its up matrices are no longer zero.
    assert first["lora_unet_double_blocks_0_img_attn_q.lora_up.weight"].abs().max() > 0


# Noise and times come from the seed alone: rank and dropout leave every step's as they are.
def test_network_does_not_change_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    step = flow.noisy_input

    def recording(
        batch: flow.Batch, noise: Tensor, t: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        drawn.extend([noise.clone(), t.clone()])
        return step(batch, noise, t, **options)

    monkeypatch.setattr(flow, "noisy_input", recording)
    sequences = []
    runs: dict[str, Any] = {"a": {}, "b": {"network_dim": 8, "network_dropout": 0.5}}
    for name, changed in runs.items():
        drawn.clear()
        run(write_run(tmp_path / name, **changed))
        sequences.append(list(drawn))
    assert len(sequences[0]) == 2 * 2 * 4
    assert all(torch.equal(*pair) for pair in zip(*sequences, strict=True))
    # And no step repeats another's.
    assert not torch.equal(sequences[0][1], sequences[0][3])


# Noise and times are streams of their own, named by what they are for, so that a seed gives the
# same ones in every version of the runner; whatever else draws numbers in the process changes
# nothing.
def test_random_streams_are_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Tensor, Tensor]] = []
    step = flow.noisy_input

    def recording(
        batch: flow.Batch, noise: Tensor, t: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        drawn.append((noise.clone(), t.clone()))
        return step(batch, noise, t, **options)

    monkeypatch.setattr(flow, "noisy_input", recording)
    folder = write_run(tmp_path / "run", network_dropout=0.5)
    states = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        states.append(run(folder))
    assert equal(*states)
    noise = torch.Generator().manual_seed(flow.derived_seed(42, "noise"))
    clock = torch.Generator().manual_seed(flow.derived_seed(42, "times"))
    times = flow.TimeSampling("shift", 1.0)
    for given, t in drawn[:4]:
        assert torch.equal(given, torch.randn(given.shape, generator=noise))
        assert torch.equal(t, times.draw(len(t), clock))


# The order is shuffled each epoch, the same for a seed, and not the file system's nor that of any
# random numbers drawn before.
def test_order_depends_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", images=6)
    with inside(folder):
        datasets = data.scan("dataset.toml", "t2v")
        listing = Path.iterdir
        monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listing(self), reverse=True))
        assert data.scan("dataset.toml", "t2v") == datasets

    def names(epoch: int, seed: int = 1) -> list[tuple[str, ...]]:
        batches = data.epoch_batches(datasets, seed=seed, epoch=epoch)
        return [tuple(item.latents.name for item in batch) for batch in batches]

    first = names(1)
    random.seed(7)
    torch.manual_seed(7)
    assert names(1) == first
    epochs = [names(epoch) for epoch in range(1, 9)]
    others = [names(1, seed=seed) for seed in range(1, 9)]
    for orders in (epochs, others):
        assert all(sorted(sum(order, ())) == sorted(sum(first, ())) for order in orders)
        # Both what is drawn among the pictures, and when the clips' one batch has its turn.
        pictures = {tuple(batch for batch in order if len(batch) == 1) for order in orders}
        turns = {[len(batch) for batch in order].index(2) for order in orders}
        assert len(pictures) == 8 and len(turns) > 1


# Which items share a batch is drawn anew each epoch: nothing is always seen beside the same.
def test_batches_are_mixed_anew(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", images=6)
    with inside(folder):
        pictures = data.scan("dataset.toml", "t2v")[0].examples
    pairs = [
        {
            frozenset(item.latents.name for item in batch)
            for batch in data.epoch_batches([data.Dataset(pictures, 2, 1)], seed=1, epoch=epoch)
        }
        for epoch in range(1, 9)
    ]
    assert all(len(pair) == 2 for epoch in pairs for pair in epoch)
    assert len(set().union(*pairs)) > 6


# A picture may be called like a crop of a clip: it is trained with its own caption, and not with
# that of the item whose crop it seems to be.
def test_a_picture_named_like_a_crop_has_its_own_caption(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for seed, name in enumerate(("red", "red_00007-013")):
        write_item(folder / "images", name, seed)
    with inside(folder):
        pictures, clips = data.scan("dataset.toml", "t2v")
    captions = {item.latents.name: item.text.name for item in (*pictures.examples, *clips.examples)}
    assert captions["red_0096x0064_hv15.safetensors"] == "red_hv15_te.safetensors"
    like_a_crop = captions["red_00007-013_0096x0064_hv15.safetensors"]
    assert like_a_crop == "red_00007-013_hv15_te.safetensors"
    # A clip's crops have the caption of the clip.
    assert captions["clip0_00000-009_0096x0064_hv15.safetensors"] == "clip0_hv15_te.safetensors"


# Items come num_repeats times an epoch; a batch has one latent shape and at most batch_size items.
def test_repeats_and_batches(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", images=3)
    write_item(folder / "clips", "short", 30, frames=5)
    with inside(folder):
        pictures, clips = data.scan("dataset.toml", "t2v")
    repeated = data.Dataset(clips.examples, clips.batch_size, 3)
    batches = data.epoch_batches([pictures, repeated], seed=1, epoch=1)
    counts: dict[str, int] = {}
    for batch in batches:
        assert len({item.shape for item in batch}) == 1
        assert len(batch) <= 2
        for item in batch:
            counts[item.latents.name] = counts.get(item.latents.name, 0) + 1
    assert sorted(counts.values()) == [1, 1, 1, 3, 3, 3]
    assert sum(len(batch) == 2 for batch in batches) == 4


# A t2v run never reads an i2v cache and the other way round; a caption's cache that is missing is
# named. Nothing is written.
def test_wrong_caches_are_refused(tmp_path: Path) -> None:
    t2v, i2v = write_run(tmp_path / "t2v"), write_run(tmp_path / "i2v", task="i2v")
    with inside(t2v):
        with pytest.raises(UserError, match=r"picture0.*this is an i2v run"):
            data.scan("dataset.toml", "i2v")
        write_item(t2v / "images", "lost", 5, text=False)
        with pytest.raises(UserError, match="'lost' has latents but no caption"):
            train.main(["--config_file", "train.toml"])
    with inside(i2v), pytest.raises(UserError, match=r"clip0.*this is a t2v run"):
        data.scan("dataset.toml", "t2v")
    assert not (t2v / "checkpoints").exists()


# The option leaves the i2v condition unscaled, as musubi trains, and that is another training.
def test_unscaled_condition_is_another_training(tmp_path: Path) -> None:
    scaled = run(write_run(tmp_path / "a", task="i2v"))
    unscaled = run(write_run(tmp_path / "b", task="i2v", i2v_unscaled_condition=True))
    assert not equal(scaled, unscaled)


OPTIMIZERS: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("AdamW", ["weight_decay=0.1", "betas=(0.9, 0.99)"], {}, "torch.optim.adamw.AdamW"),
    (
        "adafactor",
        ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
        {},
        "transformers.optimization.Adafactor",
    ),
    ("Adafactor", [], {}, "transformers.optimization.Adafactor"),
    ("Muon", ["weight_decay=0.0"], {}, "torch.optim.Muon"),
    ("torch.optim.SGD", ["momentum=0.9"], {}, "torch.optim.sgd.SGD"),
    ("prodigyopt.Prodigy", [], {"learning_rate": 1.0}, "prodigyopt.prodigy.Prodigy"),
    (
        "schedulefree.AdamWScheduleFree",
        ["warmup_steps=2"],
        {},
        "schedulefree.adamw_schedulefree.AdamWScheduleFree",
    ),
]


# Every optimizer that runs on a CPU is the one that was named, with the options and the rate that
# were given, and trains: every matrix that the prediction depends on moves and stays finite.
@pytest.mark.parametrize(
    ("name", "arguments", "more", "is_"), OPTIMIZERS, ids=[name for name, *_ in OPTIMIZERS]
)
def test_optimizers(
    tmp_path: Path, name: str, arguments: list[str], more: dict[str, Any], is_: str
) -> None:
    folder = write_run(
        tmp_path / "run",
        optimizer_type=name,
        optimizer_args=arguments,
        max_train_epochs=None,
        max_train_steps=3,
        logging_dir="tensorboard",
        **more,
    )
    trainer = trained(folder)
    kind, (group,) = type(trainer.optimizer), trainer.optimizer.param_groups
    assert f"{kind.__module__}.{kind.__name__}" == is_
    for argument in arguments:
        key, _, value = argument.partition("=")
        assert str(group[key]) == value
    state, metadata = read(folder / "checkpoints" / "lora.safetensors")
    assert metadata["ss_optimizer"].partition("(")[0] == is_
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    still = {key.split(".")[0] for key, tensor in state.items() if UP in key and not tensor.any()}
    # Nothing reads what the last block makes of the text.
    unread = ("txt_attn_proj", "txt_attn_q", "txt_mlp_fc1", "txt_mlp_fc2")
    assert still == {f"lora_unet_double_blocks_1_{module}" for module in unread}
    rates = scalars(folder)
    assert len(rates["lr/unet"]) == 3
    assert ("lr/d*lr/unet" in rates) == ("Prodigy" in name)
    given = [
        value == pytest.approx(more.get("learning_rate", 1e-2)) for _, value in rates["lr/unet"]
    ]
    # Adafactor finds a rate of its own unless it is set not to; before its first step none is.
    assert given == [True, name != "Adafactor", name != "Adafactor"]


# The final file of a schedule-free optimizer, and those of the epochs before, have its averaged
# weights, which are what inference is to use, and not those that it trains with.
def test_schedule_free_files_have_the_averaged_weights(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"optimizer_type": "schedulefree.AdamWScheduleFree"}
    folder = write_run(tmp_path / "run", save_every_n_epochs=1, **chosen)
    trainer = trained(folder)
    saved, _ = read(folder / "checkpoints" / "lora.safetensors")
    optimizer: Any = trainer.optimizer
    key = "lora_unet_double_blocks_0_img_attn_q.lora_up.weight"
    optimizer.eval()
    assert equal(saved, trainer.network.state_dict())
    optimizer.train()
    assert (trainer.network.state_dict()[key] - saved[key]).abs().max() > 1e-4
    # Going from the one to the other and back rounds.
    alone = run(write_run(tmp_path / "alone", max_train_epochs=1, **chosen))
    early, _ = read(folder / "checkpoints" / "lora-000001.safetensors")
    assert (alone[key] - early[key]).abs().max() < 1e-6


# A gradient longer than max_grad_norm is shortened to it, in its own direction; a shorter one, and
# any without a limit, is taken as it is.
def test_gradients_are_clipped(tmp_path: Path) -> None:
    free = one_step(tmp_path / "free")
    length = norm(free)
    clipped = one_step(tmp_path / "clipped", max_grad_norm=length / 8)
    assert norm(clipped) == pytest.approx(length / 8, rel=1e-3)
    for key, tensor in free.items():
        assert torch.allclose(clipped[key], tensor / 8, rtol=1e-3, atol=1e-9), key
    assert equal(one_step(tmp_path / "short", max_grad_norm=length * 2), free)


# Each batch counts for one part in gradient_accumulation_steps of a step, also where an epoch ends
# before so many have come: an i2v run has one batch here.
def test_accumulated_gradients_are_divided(tmp_path: Path) -> None:
    whole = one_step(tmp_path / "whole", task="i2v")
    quarter = one_step(tmp_path / "quarter", task="i2v", gradient_accumulation_steps=4)
    assert norm(whole) > 0
    for key, tensor in whole.items():
        assert torch.allclose(quarter[key], tensor / 4, rtol=1e-5, atol=1e-12), key


SCHEDULES: list[tuple[dict[str, Any], list[float]]] = [
    ({"lr_scheduler": "constant"}, [1, 1, 1, 1]),
    ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0, 0.5, 1, 1]),
    ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.5}, [0, 0.5, 1, 1]),
    ({"lr_scheduler": "linear"}, [1, 0.75, 0.5, 0.25]),
    ({"lr_scheduler": "cosine"}, [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2}, [1, 0.5, 1, 0.5]),
    (
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
        [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)],
    ),
    ({"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0}, [1, 0.5625, 0.25, 0.0625]),
    # With z left of all: 0.01 + 0.99 * z / (0.1 + 0.9 * z).
    (
        {"lr_scheduler": "rex"},
        [0.01 + 0.99 * z / (0.1 + 0.9 * z) for z in (1, 0.75, 0.5, 0.25)],
    ),
    # sqrt(timescale / (step + timescale - warm-up)); unset, the timescale is the warm-up.
    (
        {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 2},
        [0, 0.5, 1, math.sqrt(2 / 3)],
    ),
    (
        {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 1, "lr_scheduler_timescale": 4},
        [0, 1, math.sqrt(4 / 5), math.sqrt(4 / 6)],
    ),
    (
        {
            "lr_scheduler": "warmup_stable_decay",
            "lr_warmup_steps": 1,
            "lr_decay_steps": 2,
            "lr_scheduler_min_lr_ratio": 0.2,
        },
        [0.2, 1, 1, 0.6],
    ),
    ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 0.5}, [1, 1, 1, 0.5]),
    ({"lr_scheduler": "rex", "lr_warmup_steps": 3}, [0.01, 0.01, 0.505, 1]),
    (
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=2", "gamma=0.1"]},
        [1, 1, 0.1, 0.1],
    ),
]


def adafactor(*arguments: str, **chosen: Any) -> tuple[dict[str, Any], list[float]]:
    """Adafactor's options as it takes them, and the rate before each of four steps."""
    values = {"dit": "d", "dataset_config": "c", "output_dir": "o", "output_name": "n"}
    parsed = options.parse(
        {
            **values,
            "optimizer_type": "Adafactor",
            "optimizer_args": list(arguments),
            "learning_rate": 0.25,
            **chosen,
        }
    )
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, _ = optimizers.build_optimizer(parsed, [{"params": [weight], "lr": 0.25}])
    schedule = optimizers.build_scheduler(parsed, optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        schedule.step()
    return optimizer.param_groups[0], rates


# Adafactor sets its own rate when it is set to warm up, as musubi takes it, even if it was set
# otherwise too; set to neither it does so as well, and set not to it keeps the rate it is given.
def test_adafactor_warms_up_by_its_own_rate() -> None:
    group, _ = adafactor("relative_step=False", "warmup_init=True")
    assert (group["relative_step"], group["warmup_init"]) == (True, True)
    assert adafactor()[0]["relative_step"] is True
    group, rates = adafactor("relative_step=False", lr_scheduler="constant")
    assert group["relative_step"] is False
    assert rates == [0.25] * 4


# The rate that is shown for such an Adafactor begins with the one that was chosen, as musubi shows
# it, and is its own from then on.
def test_adafactors_first_rate_is_the_chosen_one() -> None:
    _, rates = adafactor()
    assert rates[0] == 0.25
    assert 0 < max(rates[1:]) < 0.25


# Every schedule gives the rates of its formula over four steps.
@pytest.mark.parametrize(("chosen", "expected"), SCHEDULES, ids=lambda value: str(value)[:50])
def test_schedules(chosen: dict[str, Any], expected: Sequence[float]) -> None:
    values = {"dit": "d", "dataset_config": "c", "output_dir": "o", "output_name": "n"}
    parsed = options.parse({**values, "optimizer_type": "AdamW", "learning_rate": 1.0, **chosen})
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer, _ = optimizers.build_optimizer(parsed, [{"params": [weight], "lr": 1.0}])
    schedule = optimizers.build_scheduler(parsed, optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(list(expected), abs=1e-3 if "polynomial" in str(chosen) else 1e-9)


# Checkpoints bear musubi's names, the last epoch's is the final file, and old ones are removed.
def test_checkpoints(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run",
        max_train_epochs=5,
        save_every_n_epochs=1,
        save_last_n_epochs=2,
        save_precision="bf16",
    )
    run(folder)
    files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert files == ["lora-000003.safetensors", "lora-000004.safetensors", "lora.safetensors"]
    # As readable as any file the person makes.
    (folder / "plain").touch()
    final = folder / "checkpoints" / "lora.safetensors"
    assert final.stat().st_mode == (folder / "plain").stat().st_mode
    state, metadata = read(final)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert metadata["ss_base_model_version"] == "hunyuan_video_1_5"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert (metadata["ss_steps"], metadata["ss_epoch"]) == ("20", "5")
    assert metadata["ss_optimizer"] == "torch.optim.adamw.AdamW"
    assert (metadata["ss_seed"], metadata["ss_learning_rate"]) == ("42", "0.01")
    assert metadata["modelspec.architecture"] == "hunyuan-video-1.5/lora"
    assert len(json.loads(metadata["ss_datasets"])) == 2
    hashes = lora.sshs_hashes(state, metadata)
    assert {key: metadata[key] for key in hashes} == hashes
    # What musubi trains converts for ComfyUI, and so does this.
    for_comfyui = converted(state, "comfyui")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in for_comfyui


# A LoRA's file tells how many items an epoch had, each as often as it was repeated, by what name it
# goes, at which size it was trained, and for which times where that is not for all.
@pytest.mark.parametrize(
    ("chosen", "title", "times"),
    [
        ({"metadata_reso": "960,544"}, "lora", None),
        ({"metadata_title": "My cat", "min_timestep": 200}, "My cat", "200,1000"),
        ({"metadata_title": "", "max_timestep": 700}, "lora", "0,700"),
        ({"min_timestep": 0, "max_timestep": 1000}, "lora", "0,1000"),
        ({"min_timestep": 100, "max_timestep": 900}, "lora", "100,900"),
    ],
)
def test_metadata_of_a_file(
    tmp_path: Path, chosen: dict[str, Any], title: str, times: str | None
) -> None:
    values = {"dit": "d", "dataset_config": "c", "output_name": "lora", "network_dim": 4}
    parsed = options.parse(
        {**values, "output_dir": str(tmp_path), "optimizer_type": "AdamW", **chosen}
    )
    item = data.ExampleFiles(tmp_path / "a", tmp_path / "b", (32, 1, 4, 6))
    datasets = [data.Dataset((item, item), 1, 3), data.Dataset((item,), 2, 1)]
    files = checkpoints.Checkpoints(
        parsed, datasets, optimizer="AdamW", seed=1, steps=7, epochs=1, batches=7
    )
    network = networks.Network(networks.NetworkSpec())
    adapter = networks.LoRA(networks.NetworkSpec(), 2, 2.0, 4, 4)
    network.attach(torch.nn.Linear(4, 4), "lora_unet_double_blocks_0_img_attn_q", adapter)
    _, metadata = read(files.save_last(network, step=7))
    assert metadata["ss_num_train_items"] == "7"
    counts = [one["num_items"] for one in json.loads(metadata["ss_datasets"])]
    assert counts == [2, 1]
    assert metadata["modelspec.title"] == title
    assert metadata.get("modelspec.timestep_range") == times
    size = {"960,544": "960x544"}.get(chosen.get("metadata_reso", ""))
    assert metadata.get("modelspec.resolution") == size and "modelspec.reso" not in metadata


# Checkpoints by steps bear musubi's names, and of them too the last so many are kept: three here.
def test_checkpoints_by_steps(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", max_train_epochs=5, save_every_n_steps=3, save_last_n_steps=6
    )
    run(folder)
    files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    steps = [f"lora-step{step:08d}.safetensors" for step in (12, 15, 18)]
    assert files == [*steps, "lora.safetensors"]
    _, metadata = read(folder / "checkpoints" / steps[0])
    assert (metadata["ss_steps"], metadata["ss_epoch"]) == ("12", "3")


# A run that starts from a LoRA goes on from its weights; one that does not fit is refused.
def test_training_starts_from_a_lora(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", max_train_epochs=1)
    run(first)
    old = first / "checkpoints" / "lora.safetensors"
    second = write_run(
        tmp_path / "second", max_train_steps=1, learning_rate=1e-12, network_weights=str(old)
    )
    run(second)
    before, _ = read(old)
    after, _ = read(second / "checkpoints" / "lora.safetensors")
    for key, tensor in before.items():
        assert torch.allclose(after[key], tensor, atol=1e-6), key
    other = write_run(tmp_path / "other", network_dim=3, network_weights=str(old))
    with inside(other), pytest.raises(UserError, match="does not fit this network"):
        train.main(["--config_file", "train.toml"])


# Steps an epoch are batches over accumulation, rounded up; each epoch's loss is the mean of its
# steps' losses, and metrics have musubi's names and steps.
def test_metrics_and_accumulation(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", gradient_accumulation_steps=3, logging_dir="tensorboard", seed=1
    )
    run(folder)  # 3 pictures one by one and 2 clips together: 4 batches, 2 steps an epoch
    found = scalars(folder)
    assert [step for step, _ in found["loss/current"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["loss/epoch"]] == [1, 2]
    losses = [value for _, value in found["loss/current"]]
    epochs = [value for _, value in found["loss/epoch"]]
    assert epochs == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:])], rel=1e-6)
    averages = [value for _, value in found["loss/average"]]
    assert averages[2] == pytest.approx((losses[2] + losses[1]) / 2, rel=1e-6)
    assert [value for _, value in found["lr/unet"]] == pytest.approx([1e-2] * 4)


# A loss that is no number for five steps in a row ends the run at the fifth, and no file claims to
# be its result.
def test_exploding_loss_stops(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run",
        optimizer_type="torch.optim.SGD",
        learning_rate=1e30,
        max_grad_norm=0.0,
        max_train_epochs=5,
        logging_dir="tensorboard",
    )
    with (
        inside(folder),
        pytest.raises(StageError, match=r"^the loss was not finite .* for 5 steps"),
    ):
        train.main(["--config_file", "train.toml"])
    assert not (folder / "checkpoints").exists()
    losses = [math.isfinite(value) for _, value in scalars(folder)["loss/current"]]
    assert losses == [True] * (len(losses) - 5) + [False] * 5


# A single step whose loss is not finite changes nothing: neither weights nor the average, and the
# training goes on to its end and says so.
def test_a_step_without_a_finite_loss_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squared_errors, calls = flow.squared_errors, []

    def breaking(prediction: Tensor, velocity: Tensor) -> Tensor:
        calls.append(velocity)
        errors = squared_errors(prediction, velocity)
        return errors * (math.nan if len(calls) == broken else 1.0)

    monkeypatch.setattr(flow, "squared_errors", breaking)
    plain: dict[str, Any] = {"optimizer_type": "torch.optim.SGD", "logging_dir": "tensorboard"}
    broken = 2
    state = run(write_run(tmp_path / "a", **plain))
    assert "note: the loss was not finite at 1 of 8 steps: left out" in capsys.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    logged = scalars(tmp_path / "a")
    assert [math.isnan(value) for _, value in logged["loss/current"]] == [False, True] + [False] * 6
    assert all(math.isfinite(value) for _, value in logged["loss/average"])
    calls.clear()
    broken = 1
    other = run(write_run(tmp_path / "b", **plain))
    assert not equal(state, other) and any(other[key].any() for key in other if UP in key)
    averages = [value for _, value in scalars(tmp_path / "b")["loss/average"]]
    assert [math.isnan(value) for value in averages] == [True] + [False] * 7


# Options that this engine cannot honour, and mistakes, are one line that names them.
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks_to_swap": 20}, "blocks_to_swap=20 is not supported"),
        ({"fp8_base": True}, "fp8_base=True is not supported"),
        ({"learning_rat": 1e-4}, "'learning_rat'.*did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be of type float"),
        ({"timestep_sampling": "sigma"}, "timestep_sampling='sigma' is not supported"),
        ({"num_timestep_buckets": 4}, "num_timestep_buckets=4 is not supported"),
        ({"weighting_scheme": "cosmap"}, "weighting_scheme='cosmap' is not supported"),
        ({"optimizer_type": "AdamW8bit"}, "optimizer=adamw"),
        ({"optimizer_type": "bitsandbytes.optim.Lion8bit"}, "optimizer=adamw"),
        ({"optimizer_type": "NoSuch"}, "optimizer_type='NoSuch' cannot be imported"),
        ({"optimizer_args": ["beta=(0.9"]}, "beta="),
        ({"optimizer_args": ["no_such=1"]}, "refused its options"),
        ({"lr_scheduler": "zigzag"}, "lr_scheduler='zigzag'"),
        ({"lr_warmup_steps": 5}, "takes no lr_warmup_steps"),
        ({"save_every_n_epochs": 0}, "save_every_n_epochs=0 must be at least 1"),
        ({"min_timestep": 900, "max_timestep": 100}, "no range"),
        ({"network_module": "networks.oft"}, "networks.oft"),
        ({"dit": None}, "dit is missing"),
        ({"sample_prompts": "p.txt", "sample_at_first": True}, "p.txt: cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_options(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    folder = write_run(tmp_path / "run", **changed)
    with inside(folder), pytest.raises(UserError, match=message):
        train.main(["--config_file", "train.toml"])
    assert not (folder / "checkpoints").exists()


# Prompt files read as musubi reads them, sizes rounded to what the network can make.
def test_prompts() -> None:
    text = '# no\n\na "red" kite -- at dusk --w 100 --h 64 --f 11 --d 7 --s 4 --l 5.5 --n a--b\n'
    (prompt,) = sampling.parse_prompts(text + "")
    assert prompt.text == 'a "red" kite -- at dusk'
    assert (prompt.width, prompt.height, prompt.frames) == (96, 64, 9)
    assert (prompt.seed, prompt.steps, prompt.guidance) == (7, 4, 5.5)
    assert prompt.negative == "a--b"
    with pytest.raises(UserError, match=r"line 1.*--q 3"):
        sampling.parse_prompts("kite --q 3")


# Euler's method follows a flow to its end: a constant velocity field is integrated exactly.
def test_sampling_integrates_the_flow() -> None:
    target = torch.randn(1, 32, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(5))
    found = sampling.euler(lambda *_: noise - target, noise, steps=6, shift=14.5)
    assert torch.allclose(found, target, atol=1e-5)


# Previews are pictures and clips of the size asked for, and appear whole.
@pytest.mark.parametrize("frames", [1, 5])
def test_previews_are_files(tmp_path: Path, frames: int) -> None:
    pixels = np.random.RandomState(0).randint(0, 255, (frames, 64, 96, 3), dtype=np.uint8)
    path = sampling.save_frames(tmp_path / "sample" / "lora_e000001_00_7", pixels)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if frames == 1:
        from PIL import Image

        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), pixels[0])
        return
    import av

    with av.open(str(path)) as clip:
        decoded = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert np.stack(decoded).shape == pixels.shape


# Previews come when asked for, in the network's two tasks, and leave training as it would be.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_previews_do_not_disturb_training(tmp_path: Path, task: str) -> None:
    make_weights.make_weights(tmp_path / "weights")
    parts: dict[str, Any] = {
        key: str(tmp_path / "weights" / key)
        for key in ("vae", "text_encoder", "byt5", "image_encoder")
    }
    pixels = np.random.RandomState(0).randint(0, 255, (1, 64, 96, 3), dtype=np.uint8)
    picture = sampling.save_frames(tmp_path / "first frame", pixels)
    first = f" --i {picture}" if task == "i2v" else ""
    plain = run(write_run(tmp_path / "plain", task=task, network_dropout=0.2))
    folder = write_run(
        tmp_path / "previews",
        task=task,
        network_dropout=0.2,
        sample_prompts="prompts.txt",
        sample_at_first=True,
        sample_every_n_epochs=2,
        **parts,
    )
    prompts = f'a "red" kite --w 96 --h 64 --f 5 --s 2 --d 3{first}\n'
    prompts += f"a kite --w 64 --h 64 --s 2 --l 1{first}\n"
    (folder / "prompts.txt").write_text(prompts, "utf-8")
    assert equal(run(folder), plain)
    files = sorted(path.name for path in (folder / "checkpoints" / "sample").iterdir())
    assert files == [
        f"lora_e{epoch:06d}_{name}" for epoch in (0, 2) for name in ("00_3.mp4", "01_0.png")
    ]
