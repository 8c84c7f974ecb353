"""Tencent's and diffusers' names for the transformer's weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)

from runner.core.errors import UserError
from runner.engines.diffusers.models import TINY_TRANSFORMER
from runner.formats import transformer_keys as keys


def diffusers_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(**TINY_TRANSFORMER).state_dict()


# Every weight of the model has a Tencent name, and comes back under its own unchanged.
def test_round_trip_is_exact() -> None:
    state = diffusers_state()
    tencent = keys.from_diffusers(state)
    back = keys.to_diffusers(tencent)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    # Two blocks of the refiner, whose three projections (weight and bias) are one.
    assert len(tencent) == len(state) - 2 * 2 * 2


# Two tensors are more than renamed: q, k, v of the refiner fused in this order, and the halves of
# the final modulation swapped.
def test_fused_and_swapped_tensors() -> None:
    state = diffusers_state()
    tencent = keys.from_diffusers(state)
    refiner = "context_embedder.token_refiner.refiner_blocks.1.attn"
    fused = torch.cat([state[f"{refiner}.to_{part}.weight"] for part in "qkv"])
    name = "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight"
    assert torch.equal(tencent[name], fused)
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    assert torch.equal(tencent["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))


# Comfy-Org's joined q, k and v, in this order, become the weights that Tencent's three do.
def test_joined_projections_are_taken_apart() -> None:
    state = diffusers_state()
    tencent = keys.from_diffusers(state)
    for stem in ("double_blocks.1.img_attn", "double_blocks.0.txt_attn"):
        for leaf in ("weight", "bias"):
            parts = [tencent.pop(f"{stem}_{part}.{leaf}") for part in "qkv"]
            tencent[f"{stem}_qkv.{leaf}"] = torch.cat(parts)
    back = keys.to_diffusers(tencent)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


# A block has fourteen Linears, and the map names each of them once.
def test_block_linears_are_complete() -> None:
    model = HunyuanVideo15Transformer3DModel(**TINY_TRANSFORMER)
    block = model.transformer_blocks[1]
    found = {n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert found == set(keys.BLOCK_LINEARS.values())
    assert len(keys.BLOCK_LINEARS) == 14
    for tencent in keys.BLOCK_LINEARS:
        module = f"double_blocks.1.{tencent}"
        assert keys.module_to_tencent(keys.module_to_diffusers(module)) == module


# Weights of something else are refused by name.
@pytest.mark.parametrize(
    "key", ["double_blocks.0.img_attn_qkv_norm.weight", "single_blocks.0.linear1.weight", "weight"]
)
def test_unknown_weight_is_named(key: str) -> None:
    with pytest.raises(UserError, match=r"not a module of HunyuanVideo 1\.5"):
        keys.to_diffusers({key: torch.zeros(3)})


# A refiner without one of its projections is refused, not fused short.
def test_incomplete_refiner_is_refused() -> None:
    state = diffusers_state()
    del state["context_embedder.token_refiner.refiner_blocks.0.attn.to_k.weight"]
    with pytest.raises(UserError, match="is missing one of"):
        keys.from_diffusers(state)
