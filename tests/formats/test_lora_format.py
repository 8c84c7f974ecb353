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
from lora_files import converted
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from runner.core.errors import UserError
from runner.formats import lora
from runner.formats.safetensors_header import read_header
from runner.formats.safetensors_writer import layout_of, write_with_hashes
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


def through_files(
    folder: Path, state: Mapping[str, Tensor], *forms: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds after conversions, one after the other, as the program makes them."""
    file = folder / "lora.safetensors"
    save_file(dict(state), file, METADATA)
    for form in forms:
        convert(file, file.with_suffix(".new"), form=form)
        file.with_suffix(".new").replace(file)
    with safe_open(file, framework="pt") as opened:
        return load_file(file), opened.metadata()


def figures(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, ...]:
    return metadata["sshs_model_hash"], metadata["sshs_legacy_hash"], digest(state)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# What ComfyUI gets is to the bit what musubi's converter makes, its hashes included.
@pytest.mark.parametrize("rank", TO_COMFYUI)
def test_to_comfyui_is_musubis(tmp_path: Path, rank: int) -> None:
    state, metadata = through_files(tmp_path, musubi_file(rank), "comfyui")
    assert figures(state, metadata) == TO_COMFYUI[rank]
    assert {key: metadata[key] for key in METADATA} == METADATA


# And back.
@pytest.mark.parametrize("rank", FROM_COMFYUI)
def test_from_comfyui_is_musubis(tmp_path: Path, rank: int) -> None:
    state, metadata = through_files(tmp_path, musubi_file(rank), "comfyui", "musubi")
    assert figures(state, metadata) == FROM_COMFYUI[rank]
    assert same(state, musubi_file(rank))


# Joined q, k and v act as the three did apart: up @ down * alpha / rank, one under the other.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_update_is_the_three_apart(dtype: torch.dtype) -> None:
    state = musubi_file(4, dtype)
    joined = converted(state, "comfyui")

    def update(weights: Mapping[str, Tensor], name: str) -> Tensor:
        down = weights[f"{name}.lora_down.weight"].double()
        up = weights[f"{name}.lora_up.weight"].double()
        return up @ down * float(weights[f"{name}.alpha"]) / down.shape[0]

    stem = "lora_unet_double_blocks_1_txt_attn_"
    apart = torch.cat([update(state, stem + part) for part in "qkv"])
    assert torch.allclose(update(joined, stem + "qkv"), apart, rtol=1e-12)
    assert joined[f"{stem}qkv.lora_down.weight"].dtype == dtype


# The input is left as it was.
@pytest.mark.parametrize("form", ["comfyui", "diffusers"])
def test_conversion_leaves_its_input_alone(form: str) -> None:
    state = musubi_file(2)
    converted(state, form)
    assert same(state, musubi_file(2))


# A network trained on some of q, k and v still converts: what was not trained is zero.
def test_untrained_projection_counts_as_zero() -> None:
    state = {k: v for k, v in musubi_file(2).items() if "img_attn_k" not in k}
    joined = converted(state, "comfyui")
    back = converted(joined, "musubi")
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
    for_comfyui = converted(state, "comfyui")
    prefix = "lora_unet_double_blocks_0_"
    theirs = {key.partition(".")[0].removeprefix(prefix) for key in for_comfyui}
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
        joined = update(for_comfyui, f"{prefix}{stream}_attn_qkv")
        assert torch.allclose(joined, torch.cat(apart), rtol=1e-5, atol=1e-6)
        for ours, other in (("mlp_fc1", "mlp_0"), ("mod_linear", "mod_lin")):
            same_module = update(for_comfyui, f"{prefix}{stream}_{other}")
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
    back = converted(converted(state, "comfyui"), "musubi")
    assert same(back, state)
    with pytest.raises(UserError, match=r"is of network=lokr, and conversion from ComfyUI covers"):
        converted(converted(other_file("lokr"), "comfyui"), "musubi")


# q, k and v of different kinds don't join.
def test_kinds_are_not_mixed() -> None:
    state = other_file("loha") | {
        key: value for key, value in other_file("lokr").items() if "img_attn_v" in key
    }
    state = {k: v for k, v in state.items() if "img_attn_v.hada" not in k}
    with pytest.raises(UserError, match=r"q, k and v of .*_img_attn' are different adapters"):
        converted(state, "comfyui")


# A damaged file is named, not converted in part.
def test_incomplete_module_is_refused() -> None:
    state = musubi_file(2)
    del state["lora_unet_double_blocks_0_img_attn_q.alpha"]
    with pytest.raises(UserError, match="img_attn_q"):
        converted(state, "comfyui")


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
    convert(comfyui, back, form="musubi")
    for file in (comfyui, back):
        with safe_open(file, framework="pt") as opened:
            kept = {key: opened.metadata().get(key) for key in METADATA}
            assert kept == METADATA


# The header and the hashes are those that the library would give the same tensors, whatever the
# metadata and however the dtypes are mixed.
@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16", "float32", "float16")])
def test_written_as_the_library_writes(tmp_path: Path, dtypes: tuple[str, ...]) -> None:
    state = {
        key: tensor.to(getattr(torch, dtypes[index % len(dtypes)]))
        for index, (key, tensor) in enumerate(musubi_file(32).items())
    }
    metadata = {**METADATA, "ss_training_comment": 'a "quote"\n\\ ünïcode \x01', "other": "猫"}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_with_hashes(
        ours, {key: layout_of(t) for key, t in state.items()}, state.__getitem__, metadata
    )
    with safe_open(ours, framework="pt") as opened:
        written = opened.metadata()
    assert written == {**metadata, **lora.sshs_hashes(state, metadata)}
    save_file(state, theirs, written)
    assert same(load_file(ours), state)
    # The library writes the metadata's keys in any order.
    assert ours.stat().st_size == theirs.stat().st_size
    assert read_header(ours) == read_header(theirs)


def diffusers_update(state: Mapping[str, Tensor], name: str) -> Tensor:
    """What a module adds to its weight by load_lora_adapter, where alpha counts as the rank."""
    if f"{name}.lora_A.weight" in state:
        return state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()
    second = state.get(f"{name}.lokr_w2")
    if second is None:
        second = state[f"{name}.lokr_w2_a"] @ state[f"{name}.lokr_w2_b"]
    return torch.kron(state[f"{name}.lokr_w1"], second)


# Every module that diffusers loads adds what it adds in musubi, though no alpha is read; a scale
# that is a power of two leaves the dtype, another one is not rounded to bf16.
@pytest.mark.parametrize(("kind", "whole"), [("lora", False), ("lokr", False), ("lokr", True)])
def test_diffusers_adds_the_same(kind: str, whole: bool) -> None:
    state = musubi_file(4) if kind == "lora" else other_file(kind, whole=whole)
    theirs = converted(state, "diffusers")
    assert not any(key.endswith("alpha") for key in theirs)
    for module, name in BLOCK_LINEARS.items():
        source = lora.lora_name(f"double_blocks.0.{module}")
        if kind == "lora":
            pair = (state[f"{source}.lora_{side}.weight"].double() for side in ("up", "down"))
            expected = torch.linalg.multi_dot(list(pair)) / 2
        else:
            expected = update(state, source)
        made = diffusers_update(theirs, f"transformer.transformer_blocks.0.{name}")
        assert torch.allclose(made, expected, rtol=1e-5, atol=1e-6)
    half = {key: tensor.bfloat16() for key, tensor in musubi_file(4).items()}
    up = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    assert converted(half, "diffusers")[up].dtype == torch.bfloat16
    third = {key: t / 1.5 if key.endswith("alpha") else t for key, t in half.items()}
    assert converted(third, "diffusers")[up].dtype == torch.float32


# diffusers' loader has no LoHa: it is said before anything is written.
def test_a_loha_is_refused_for_diffusers() -> None:
    with pytest.raises(UserError, match="conversion to diffusers covers lora and lokr"):
        converted(other_file("loha"), "diffusers")


# The file of a large LoKr, whose updates are written out whole, takes no more memory than its
# largest module needs: sixteen times the blocks, less than half of what the file grew by.
def test_a_growing_lokr_needs_little_memory(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from runner.pipeline.comfyui import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[1]).with_suffix('.out'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    needed = []
    for blocks in (1, 16):
        file = tmp_path / f"lokr{blocks}"
        state = {}
        for module in ("img_attn_q", "img_attn_k", "img_attn_v"):
            for block in range(blocks):
                name = lora.lora_name(f"double_blocks.{block}.{module}")
                state[f"{name}.lokr_w1"] = torch.ones(32, 32, dtype=torch.bfloat16)
                state[f"{name}.lokr_w2_a"] = torch.ones(64, 4, dtype=torch.bfloat16)
                state[f"{name}.lokr_w2_b"] = torch.ones(4, 64, dtype=torch.bfloat16)
                state[f"{name}.alpha"] = torch.tensor(4, dtype=torch.bfloat16)
        save_file(state, file)
        done = subprocess.run(
            [sys.executable, "-c", code, file], capture_output=True, text=True, check=True
        )
        needed.append(int(done.stdout) * 1024)
    grown = file.with_suffix(".out").stat().st_size
    file.with_suffix(".out").unlink()
    assert grown > 16 * 3 * 2048 * 2048 * 2
    assert needed[1] - needed[0] < 0.5 * grown
