"""What diffusers' own load_lora_adapter makes of an exported LoRA; it needs PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_networks import prediction, randomise, tiny

from runner.engines.diffusers import networks
from runner.pipeline.comfyui import convert


# diffusers loads every key, and its network then predicts what the trained one does.
@pytest.mark.parametrize(
    ("kind", "rank", "alpha"),
    [("lora", 3, 1.0), ("lora", 4, 2.0), ("lokr", 2, 1.0), ("lokr", 64, 1.0)],
)
def test_diffusers_loads_it(tmp_path: Path, kind: str, rank: int, alpha: float) -> None:
    pytest.importorskip("peft", reason="pip install peft")
    trained = tiny()
    network = networks.create(trained, networks.NetworkSpec(kind, rank, alpha), seed=0)
    randomise(network)
    save_file(dict(network.state_dict()), tmp_path / "lora.safetensors")
    number = convert(
        tmp_path / "lora.safetensors", tmp_path / "diffusers.safetensors", form="diffusers"
    )
    loaded = tiny()
    before = prediction(loaded)
    loaded.load_lora_adapter(str(tmp_path), weight_name="diffusers.safetensors")
    own = [name for name, _ in loaded.named_parameters() if "lora_" in name or "lokr_" in name]
    assert len(own) == number
    expected = prediction(trained)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert torch.allclose(prediction(loaded), expected, atol=1e-5)
