"""Executables with a limit on their memory compute the same, and say where everything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_run import inside, write_run

from runner.engines.diffusers import evaluate, train

# The tiny network has two blocks, and less than this for each.
LIMIT = ["--memory_limit_gb", "0.001"]


# A run whose blocks all wait in main memory has the LoRA and the evaluation of one without limit.
def test_a_run_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[dict[str, Any]] = []
    limits: dict[str, list[str]] = {"plain": [], "limited": LIMIT}
    for name, limit in limits.items():
        folder = write_run(tmp_path / name, gradient_checkpointing=True)
        capsys.readouterr()
        with inside(folder):
            train.main(["--config_file", "train.toml", *limit])
            arguments = ["--dataset_config", "dataset.toml", "--output", "evaluation.json"]
            arguments += ["--config_file", "train.toml", "--lora", "checkpoints/lora.safetensors"]
            evaluate.main([*arguments, *limit])
        said = [line for line in capsys.readouterr().out.splitlines() if "memory:" in line]
        assert len(said) == 2 * bool(limit)
        assert all("2 of 2 blocks in main memory" in line for line in said)
        found.append(load_file(folder / "checkpoints" / "lora.safetensors"))
        found[-1]["figures"] = json.loads((folder / "evaluation.json").read_text("utf-8"))
    plain, limited = found
    assert plain.pop("figures") == limited.pop("figures")
    assert plain.keys() == limited.keys()
    assert all(torch.equal(plain[key], limited[key]) for key in plain)


# memory.checkpointing=none is obeyed: everything is kept, and nothing waits in main memory.
def test_checkpointing_can_be_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, gradient_checkpointing=False, max_train_epochs=1)
    with inside(folder):
        train.main(["--config_file", "train.toml", *LIMIT])
    assert "in main memory" not in capsys.readouterr().out
