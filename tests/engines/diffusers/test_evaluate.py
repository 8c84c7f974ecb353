"""The comparable loss: the same items, times and noise whatever the run."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from cache_process import context_of
from other_processes import pictures
from training_run import inside, write_item, write_run

from runner.core.command import Command
from runner.core.console import Console
from runner.core.errors import StageError, UserError
from runner.engines.diffusers import evaluate, train
from runner.pipeline.context import Context
from runner.pipeline.stages.evaluate import EVALUATE
from runner.tracking.metrics import Point
from runner.tracking.mlflow_run import NullWriter


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
    dataset = tomllib.loads((folder / "dataset.toml").read_text("utf-8"))
    for table in dataset["datasets"]:
        table |= {"num_repeats": 4, "batch_size": 1}
    (folder / "dataset.toml").write_text(tomli_w.dumps(dataset), "utf-8")
    for path in list((folder / "images").iterdir()):
        # Other names, other order.
        path.rename(path.with_name(path.name.replace("picture0", "zebra")))
    other = figures(folder)
    assert other["base_loss"] == pytest.approx(one["base_loss"], rel=1e-12)
    assert other["loss"] != one["loss"]


# Noise belongs to an item's content and the time: other latents, other noise.
def test_noise_is_the_items_own() -> None:
    latents = torch.randn(32, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    noise = evaluate.example_noise(latents)
    assert torch.equal(noise, evaluate.example_noise(latents.clone()))
    assert noise.shape == (8, 32, 1, 4, 6)
    assert all(not torch.equal(noise[0], noise[index]) for index in range(1, 8))
    assert not torch.equal(noise, evaluate.example_noise(latents + 1e-3))


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


class Writer(NullWriter):
    """Remembers what MLflow would show."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Point] = []
        self.tags: dict[str, object] = {}

    def log_points(self, points: Sequence[Point]) -> None:
        self.points += points

    def set_tags(self, tags: Any) -> None:
        self.tags.update(tags)


def evaluated(tmp_path: Path, result: dict[str, Any] | None, *overrides: str) -> Writer:
    """The stage with an engine that gives this result at once; what it logged to MLflow."""
    writer, console = Writer(), Console.for_stream(io.StringIO())
    outputs, media = tmp_path / "out", pictures(tmp_path / "media", 12)
    context: Context = context_of(outputs, media, "engine=diffusers", *overrides, console=console)
    code = (
        "pass" if result is None else f"open('evaluation.json', 'w').write({json.dumps(result)!r})"
    )
    command = Command((sys.executable, "-I", "-c", code))
    stages = tuple(
        dataclasses.replace(stage, commands=(command,)) if stage.name == "evaluate" else stage
        for stage in context.plan.stages
    )
    context.plan = dataclasses.replace(context.plan, stages=stages)
    context.writer = writer
    EVALUATE.run(context)
    return writer


# The gain is by how much the LoRA lowers the loss: more than zero where it is better than nothing,
# less where it is worse. All three are at step 0 alone, as bars side by side.
@pytest.mark.parametrize(("loss", "gain"), [(0.25, 0.5), (1.0, -0.25)])
def test_the_gain_is_what_the_lora_lowers(tmp_path: Path, loss: float, gain: float) -> None:
    writer = evaluated(tmp_path, {"loss": loss, "base_loss": 0.75, "items": 12})
    assert {point.key: point.value for point in writer.points} == {
        "eval/loss": loss,
        "eval/base_loss": 0.75,
        "eval/gain": gain,
    }
    assert [point.step for point in writer.points] == [0, 0, 0]
    assert writer.tags == {"eval.items": "12 training items"}


# Of what the losses are is reported: of the items that were held out when there are any.
def test_held_out_items_are_told(tmp_path: Path) -> None:
    result = {"loss": 1.0, "base_loss": 1.0, "items": 5}
    writer = evaluated(tmp_path, result, "dataset.validation_fraction=0.5")
    assert writer.tags == {"eval.items": "5 held-out items"}


# An engine that ends well and writes no figures has failed, and tells MLflow nothing.
def test_an_engine_without_figures_has_failed(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"without writing .*evaluation\.json \(log: "):
        evaluated(tmp_path, None)
