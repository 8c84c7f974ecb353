"""The comparable loss: the same items, times and noise whatever the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_run import inside, write_item, write_run

from runner.core.errors import UserError
from runner.engines.diffusers import evaluate, train


def figures(folder: Path, lora: str = "checkpoints/lora.safetensors") -> dict[str, Any]:
    with inside(folder):
        evaluate.main(
            [
                *("--config_file", "train.toml", "--dataset_config", "dataset.toml"),
                *("--lora", lora, "--output", "results/evaluation.json"),
            ]
        )
    assert [path.name for path in (folder / "results").iterdir()] == ["evaluation.json"]
    return json.loads((folder / "results" / "evaluation.json").read_text("utf-8"))


def trained(folder: Path, **changed: Any) -> Path:
    write_run(folder, **changed)
    with inside(folder):
        train.main(["--config_file", "train.toml"])
    return folder


# Each item counts once at each of eight times, and the sums are what the parts say.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_figures(tmp_path: Path, task: str) -> None:
    found = figures(trained(tmp_path / "run", task=task, max_train_epochs=8))
    assert found["items"] == (5 if task == "t2v" else 2)
    assert found["timesteps"] == [(index + 0.5) / 8 for index in range(8)]
    for name in ("loss", "base_loss"):
        parts = found[f"{name}_by_timestep"]
        assert len(parts) == 8
        assert found[name] == pytest.approx(sum(parts) / 8)
    # Trained on these very items, the LoRA must do better than nothing.
    assert found["loss"] < found["base_loss"]


# The base loss is the same for every run on a dataset: seed, times, rank, batch size, repeats and
# precision of the file do not touch it, nor does the order of the items.
def test_base_loss_is_the_datasets_own(tmp_path: Path) -> None:
    one = figures(trained(tmp_path / "a", max_train_epochs=1))
    folder = trained(
        tmp_path / "b", max_train_epochs=1, seed=9, network_dim=2, timestep_sampling="uniform"
    )
    dataset = (folder / "dataset.toml").read_text("utf-8")
    dataset = dataset.replace("num_repeats = 1", "num_repeats = 4")
    (folder / "dataset.toml").write_text(dataset.replace("batch_size = 2", "batch_size = 1"))
    for path in list((folder / "images").iterdir()):
        # Other names, other order.
        path.rename(path.with_name(path.name.replace("picture0", "zebra")))
    other = figures(folder)
    assert other["base_loss"] == pytest.approx(one["base_loss"], rel=1e-12)
    assert other["loss"] != one["loss"]


# Noise belongs to an item's content and the time: other latents, other noise.
def test_noise_is_the_items_own() -> None:
    latents = torch.randn(32, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    noise = evaluate.item_noise(latents)
    assert torch.equal(noise, evaluate.item_noise(latents.clone()))
    assert noise.shape == (8, 32, 1, 4, 6)
    assert all(not torch.equal(noise[0], noise[index]) for index in range(1, 8))
    assert not torch.equal(noise, evaluate.item_noise(latents + 1e-3))


# A LoRA that is no file, or fits another model, is one clear line and leaves nothing behind.
def test_bad_lora(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "bad.safetensors").write_bytes(b"no")
    for lora in ("bad.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match=f"{lora}: not a LoRA file"):
            figures(folder, lora)
    assert not (folder / "results").exists()
    write_item(folder / "images", "lost", 5, text=False)
    with pytest.raises(UserError, match="'lost'"):
        figures(folder, "bad.safetensors")
