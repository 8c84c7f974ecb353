"""LoRA files: names, ComfyUI's form and diffusers', against figures of musubi's own converter."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runner.core.errors import UserError
from runner.formats import lora
from runner.formats.transformer_keys import BLOCK_LINEARS
from runner.pipeline.comfyui import convert

HIDDEN = 128  # at rank 32 the file passes 1 MiB, where the legacy hash begins
METADATA = {"ss_network_dim": "4", "ss_seed": "42", "modelspec.title": "a title"}

# rank: (sshs_model_hash, sshs_legacy_hash, digest of names, types, shapes and values), recorded by
# running musubi-tuner v0.3.4's convert_hunyuan_video_1_5_lora_to_comfy.py on `musubi_file(rank)`.
TO_COMFYUI = {
    1: (
        "8289cf6255294266f1d7faa88f70a486038a08c011c3dd26a9b895333475b60b",
        "e3b0c442",
        "dc1e0a258aaa0bf8",
    ),
    4: (
        "7e8e05db5ed1749e362aa40548e4f0c54eb5fc24628141054ca6096e199033f0",
        "e3b0c442",
        "c9772bd7eab7a570",
    ),
    32: (
        "c24857426768b20d5b45bffc3c916b0f1134d0013af07a0ce14e88563ccb1461",
        "fb09b9cf",
        "6431f2b021d37f92",
    ),
}
# The same after its --reverse of those.
FROM_COMFYUI = {
    1: (
        "0ca204d209eb9b79ffe13540a77cb76898f1b07711cdcb70d19814040b9fd2cc",
        "e3b0c442",
        "e1fa280e47101473",
    ),
    4: (
        "b5ec590cb9d7e8aaa02cc709ec1f6e9fc6bf9a990b3fc1837032a8cbc25caab1",
        "e3b0c442",
        "88f039f7996bf7cf",
    ),
    32: (
        "79ec1332b5706f5fa1662407e0c72529f06e84e6df64ab1b2b15a3d843ffc30c",
        "5ec8c3e7",
        "20008a07f0d7f697",
    ),
}


def musubi_file(rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A LoRA file of two blocks with numbers that depend on the names alone, alpha = rank / 2."""
    state = {}
    for block in range(2):
        for module in BLOCK_LINEARS:
            name = lora.lora_name(f"double_blocks.{block}.{module}")
            stream = np.random.RandomState(zlib.crc32(name.encode()))
            inputs = 4 * HIDDEN if module.endswith("fc2") else HIDDEN
            outputs = HIDDEN * (6 if "mod" in module else 4 if module.endswith("fc1") else 1)
            for leaf, shape in (("lora_down", (rank, inputs)), ("lora_up", (outputs, rank))):
                values = stream.standard_normal(shape).astype(np.float32)
                state[f"{name}.{leaf}.weight"] = torch.from_numpy(values).to(dtype)
            state[f"{name}.alpha"] = torch.tensor(rank / 2, dtype=dtype)
    return state


def digest(state: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def figures(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[str, ...]:
    assert metadata is not None
    return metadata["sshs_model_hash"], metadata["sshs_legacy_hash"], digest(state)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# What ComfyUI gets is to the bit what musubi's converter makes, its hashes included.
@pytest.mark.parametrize("rank", TO_COMFYUI)
def test_to_comfyui_is_musubis(rank: int) -> None:
    state, metadata = lora.to_comfyui(musubi_file(rank), METADATA)
    assert figures(state, metadata) == TO_COMFYUI[rank]
    assert metadata is not None
    assert {key: metadata[key] for key in METADATA} == METADATA


# And back.
@pytest.mark.parametrize("rank", FROM_COMFYUI)
def test_from_comfyui_is_musubis(rank: int) -> None:
    state, metadata = lora.from_comfyui(*lora.to_comfyui(musubi_file(rank), METADATA))
    assert figures(state, metadata) == FROM_COMFYUI[rank]
    assert same(state, musubi_file(rank))


# Joined q, k and v act as the three did apart: up @ down * alpha / rank, one under the other.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_update_is_the_three_apart(dtype: torch.dtype) -> None:
    state = musubi_file(4, dtype)
    joined, _ = lora.to_comfyui(state, None)

    def update(weights: Mapping[str, Tensor], name: str) -> Tensor:
        down = weights[f"{name}.lora_down.weight"].double()
        up = weights[f"{name}.lora_up.weight"].double()
        return up @ down * float(weights[f"{name}.alpha"]) / down.shape[0]

    stem = "lora_unet_double_blocks_1_txt_attn_"
    apart = torch.cat([update(state, stem + part) for part in "qkv"])
    assert torch.allclose(update(joined, stem + "qkv"), apart, rtol=1e-12)
    assert joined[f"{stem}qkv.lora_down.weight"].dtype == dtype


# A file without metadata stays without; the input is left as it was.
def test_conversion_leaves_its_input_alone() -> None:
    state = musubi_file(2)
    _, metadata = lora.to_comfyui(state, None)
    assert metadata is None
    assert same(state, musubi_file(2))


# A network trained on some of q, k and v still converts: what was not trained is zero.
def test_untrained_projection_counts_as_zero() -> None:
    state = {k: v for k, v in musubi_file(2).items() if "img_attn_k" not in k}
    joined, _ = lora.to_comfyui(state, None)
    back, _ = lora.from_comfyui(joined, None)
    assert not back["lora_unet_double_blocks_0_img_attn_k.lora_up.weight"].any()
    assert same({k: v for k, v in back.items() if "img_attn_k" not in k}, state)


def other_file(kind: str, *, whole: bool = False) -> dict[str, Tensor]:
    """A LoHa or LoKr of one block, hidden width 12, rank 3, alpha 1.5."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for module in BLOCK_LINEARS:
        inputs = 48 if module.endswith("fc2") else 12
        outputs = 12 * (6 if "mod" in module else 4 if module.endswith("fc1") else 1)
        shapes = {
            "loha": {
                **{f"hada_w{n}_a": (outputs, 3) for n in (1, 2)},
                **{f"hada_w{n}_b": (3, inputs) for n in (1, 2)},
            },
            "lokr": {
                "lokr_w1": (3, 4),
                "lokr_w2_a": (outputs // 3, 3),
                "lokr_w2_b": (3, inputs // 4),
            },
        }[kind]
        if whole and kind == "lokr":
            shapes = {"lokr_w1": (3, 4), "lokr_w2": (outputs // 3, inputs // 4)}
        name = lora.lora_name(f"double_blocks.0.{module}")
        state |= {f"{name}.{leaf}": torch.randn(shape) for leaf, shape in shapes.items()}
        state[f"{name}.alpha"] = torch.tensor(3.0 if "lokr_w2" in shapes else 1.5)
    return state


def update(state: Mapping[str, Tensor], name: str) -> Tensor:
    """What a module adds to its weight, as ComfyUI's weight adapters compute it."""
    leaf = {
        key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")
    }
    if "hada_w1_a" in leaf:
        first, second = (leaf[f"hada_w{n}_a"] @ leaf[f"hada_w{n}_b"] for n in (1, 2))
        return first * second * (leaf["alpha"] / leaf["hada_w1_b"].shape[0])
    if "lokr_w2" in leaf:
        return torch.kron(leaf["lokr_w1"], leaf["lokr_w2"])
    second = leaf["lokr_w2_a"] @ leaf["lokr_w2_b"]
    return torch.kron(leaf["lokr_w1"], second) * (leaf["alpha"] / leaf["lokr_w2_b"].shape[0])


# A LoHa or LoKr adds to ComfyUI's weights what it adds to musubi's, q, k and v one under the other,
# one of them untrained or not.
@pytest.mark.parametrize("left_out", ["", "img_attn_k"])
@pytest.mark.parametrize(("kind", "whole"), [("loha", False), ("lokr", False), ("lokr", True)])
def test_other_networks_add_the_same(kind: str, whole: bool, left_out: str) -> None:
    state = other_file(kind, whole=whole)
    if left_out:
        state = {key: value for key, value in state.items() if left_out not in key}
    converted, metadata = lora.to_comfyui(state, METADATA)
    assert metadata is not None
    assert metadata["sshs_model_hash"] == lora.sshs_hashes(converted, METADATA)["sshs_model_hash"]
    prefix = "lora_unet_double_blocks_0_"
    theirs = {key.partition(".")[0].removeprefix(prefix) for key in converted}
    assert theirs == {
        f"{stream}_{module}"
        for stream in ("img", "txt")
        for module in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    }
    for stream in ("img", "txt"):
        parts = [f"{prefix}{stream}_attn_{part}" for part in "qkv"]
        apart = [
            torch.zeros(12, 12) if left_out and part.endswith(left_out) else update(state, part)
            for part in parts
        ]
        joined = update(converted, f"{prefix}{stream}_attn_qkv")
        assert torch.allclose(joined, torch.cat(apart), rtol=1e-5, atol=1e-6)
        for ours, other in (("mlp_fc1", "mlp_0"), ("mod_linear", "mod_lin")):
            same_module = update(converted, f"{prefix}{stream}_{other}")
            assert torch.equal(same_module, update(state, f"{prefix}{stream}_{ours}"))


# The kind, rank and alpha of a file are read from it, of a LoKr with whole second factors too.
def test_other_networks_are_described(tmp_path: Path) -> None:
    for kind, whole, alpha in (("loha", False, 1.5), ("lokr", False, 1.5), ("lokr", True, 3.0)):
        file = tmp_path / "file.safetensors"
        save_file(other_file(kind, whole=whole), file)
        assert lora.describe(file) == (kind, 3, alpha)


# A matrix that is none is one line, and no crash.
def test_a_matrix_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_q"
    for state in (
        {f"{name}.lora_down.weight": torch.tensor(1.0)},
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.alpha": torch.ones(2)},
    ):
        save_file(state, file)
        with pytest.raises(UserError, match="can't be read as a LoRA file: a tensor's shape"):
            lora.describe(file)


# A LoHa comes back from ComfyUI's form as it was; a LoKr's factors are gone, which is said.
def test_other_networks_and_back() -> None:
    state = other_file("loha")
    back, _ = lora.from_comfyui(*lora.to_comfyui(state, None))
    assert same(back, state)
    with pytest.raises(UserError, match=r"is of network=lokr, and conversion from ComfyUI covers"):
        lora.from_comfyui(*lora.to_comfyui(other_file("lokr"), None))


# q, k and v of different kinds don't join.
def test_kinds_are_not_mixed() -> None:
    state = other_file("loha") | {
        key: value for key, value in other_file("lokr").items() if "img_attn_v" in key
    }
    state = {k: v for k, v in state.items() if "img_attn_v.hada" not in k}
    with pytest.raises(UserError, match=r"q, k and v of .*_img_attn' are different adapters"):
        lora.to_comfyui(state, None)


# A damaged file is named, not converted in part.
def test_incomplete_module_is_refused() -> None:
    state = musubi_file(2)
    del state["lora_unet_double_blocks_0_img_attn_q.alpha"]
    with pytest.raises(UserError, match="img_attn_q"):
        lora.to_comfyui(state, {})


# `runner.pipeline.plan` may import the formats: they must not load torch.
def test_import_is_light() -> None:
    code = (
        "import sys, runner.formats.lora, runner.formats.transformer_keys\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The file for ComfyUI, and the one made back from it, describe the training what its LoRA says.
def test_converted_files_keep_their_metadata(tmp_path: Path) -> None:
    first, comfyui, back = (tmp_path / f"{n}.safetensors" for n in ("lora", "comfyui", "back"))
    save_file(musubi_file(2), first, METADATA)
    convert(first, comfyui)
    convert(comfyui, back, reverse=True)
    for file in (comfyui, back):
        with safe_open(file, framework="pt") as opened:
            kept = {key: opened.metadata().get(key) for key in METADATA}
            assert kept == METADATA
