"""Loading the published files: every part at full size, one tensor at a time, buffers exact."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_weights import DTYPES, published, write_sparse

from runner.core.errors import UserError
from runner.engines.diffusers import models
from runner.engines.diffusers import published as loading
from runner.engines.diffusers import published_names as names
from runner.engines.diffusers.published_layout import Layout, layout

RENAME: dict[str, names.Rename] = {
    "vae": names.vae_name,
    "text_encoder": names.text_encoder_name,
    "byt5": names.byt5_name,
    "image_encoder": names.image_encoder_name,
}
# T5EncoderModel has the embedding twice, and the file once.
TWICE = "encoder.embed_tokens.weight"
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 16, "rope_parameters": ROPE,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "transformer": models.TINY_TRANSFORMER,
    "vae": {"block_out_channels": (8, 16, 32, 64, 64), "layers_per_block": 1},
    "text_encoder": TEXT,
    "byt5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "image_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 56,
    },
}  # fmt: skip


def file_of(part: str, folder: Path, dtype: torch.dtype, **sizes: Any) -> Path:
    """A small file of a part with the names of the published one."""
    file = folder / f"{part}.safetensors"
    save_file({"shared.weight": torch.zeros(400, 1)}, file)
    model = loading.build(part, file, **{**SMALL[part], **sizes})
    own = {name: torch.rand(value.shape, dtype=dtype) for name, value in model.named_parameters()}
    if part == "transformer":
        from runner.formats.transformer_keys import from_diffusers

        save_file(from_diffusers(own), file)
    else:
        theirs = {RENAME[part](name): name for name in layout(part)}
        save_file({theirs[name]: value for name, value in own.items() if name in theirs}, file)
    return file


# At full size every name of a file's layout is one of its class's, of the same shape, and none of
# the class's is left without. (The transformer's: test_published_check.py.)
@pytest.mark.parametrize("part", RENAME)
def test_every_name_has_its_place_at_full_size(part: str, tmp_path: Path) -> None:
    model = loading.build(part, published(part, tmp_path / "w"))
    assert all(parameter.is_meta for parameter in model.parameters())
    own = {name: tuple(value.shape) for name, value in model.named_parameters()}
    own.pop(TWICE, None)
    assert {RENAME[part](name): shape for name, shape in layout(part).items()} == own


# ByT5 has as many rows as its file.
def test_byt5_has_the_rows_of_its_file(tmp_path: Path) -> None:
    shapes = {**layout("byt5"), "shared.weight": (1510, 1472)}
    model: Any = loading.build("byt5", write_sparse(tmp_path / "w", shapes, "F16"))
    assert model.shared.weight.shape == (1510, 1472)


# Every part gets the dtype that musubi-tuner casts to, whatever the file holds; SigLIP and the
# transformer keep the file's; a dtype that is asked for wins.
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("transformer", torch.float32),
        ("vae", torch.float16),
        ("text_encoder", torch.bfloat16),
        ("byt5", torch.float16),
        ("image_encoder", torch.float32),
    ],
)
def test_dtypes(part: str, expected: torch.dtype, tmp_path: Path) -> None:
    file = file_of(part, tmp_path, torch.float32)
    for asked, given in ((None, expected), (torch.bfloat16, torch.bfloat16)):
        model = loading.fill(
            part, loading.build(part, file, **SMALL[part]), file, dtype=asked
        )  # fmt: skip
        assert {parameter.dtype for parameter in model.parameters()} == {given}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training


# Each tensor has its own values, also where nothing is cast and all go through one buffer.
def test_values_are_the_files(tmp_path: Path) -> None:
    file = file_of("image_encoder", tmp_path, torch.float32)
    small = SMALL["image_encoder"]
    model = loading.fill("image_encoder", loading.build("image_encoder", file, **small), file)
    own = dict(model.named_parameters())
    tensors = load_file(file)
    assert len(tensors) == len(own) > 40
    for name, expected in tensors.items():
        assert torch.equal(own[str(names.image_encoder_name(name))], expected), name


# Buffers, which no file holds, are real, and stay exact when the weights are cast.
def test_buffers_are_exact(tmp_path: Path) -> None:
    file = file_of("text_encoder", tmp_path, torch.float32)
    model: Any = loading.fill("text_encoder", loading.build("text_encoder", file, **TEXT), file)
    inverse = model.rotary_emb.inv_freq
    assert inverse.dtype == torch.float32
    assert torch.equal(inverse, 1 / 1e6 ** (torch.arange(0, 16, 2).float() / 16))
    full: Any = loading.build("text_encoder", published("text_encoder", tmp_path / "q"))
    exact = [1e6 ** (-index / 128) for index in range(0, 128, 2)]
    assert full.rotary_emb.inv_freq.tolist() == pytest.approx(exact, rel=1e-6)
    vision: Any = loading.build("image_encoder", published("image_encoder", tmp_path / "v"))
    assert vision.embeddings.position_ids.tolist() == [list(range(729))]


# What the class has no use for is not read: a vision tower of 300 GB costs nothing.
def test_the_vision_tower_is_not_read(tmp_path: Path) -> None:
    shapes: Layout = {"visual.blocks.0.mlp.up_proj.weight": (10**6, 150_000)}
    model = loading.build("text_encoder", tmp_path, **TEXT)
    theirs = {names.text_encoder_name(name): name for name in layout("text_encoder")}
    for own, value in model.named_parameters():
        shapes[str(theirs[own])] = tuple(value.shape)
    file = write_sparse(tmp_path / "w", {**shapes, "lm_head.weight": (16, 64)}, "BF16")
    loading.fill("text_encoder", model, file)
    assert not any(value.is_meta for value in model.parameters())


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# Main memory never holds more than what stays there and one tensor more, mapped pages included:
# here 18 tensors of 16 MB, which stay as 8 MB each.
def test_peak_memory(tmp_path: Path) -> None:
    sizes = {**TEXT, "hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 6}
    sizes |= {"rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}}
    file = file_of("text_encoder", tmp_path, torch.float32, **sizes)
    model = loading.build("text_encoder", file, **sizes)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts from here.
    loading.fill("text_encoder", model, file)
    stays = sum(value.nbytes for value in model.parameters())
    assert stays > 18 * 8e6
    assert resident("VmHWM") - before < stays + 16e6 + 8e6


# A tensor without a place, one of another shape, and one that is missing are named.
def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    file = file_of("text_encoder", tmp_path, torch.float32)

    def fill(**sizes: Any) -> None:
        model = loading.build("text_encoder", file, **{**TEXT, **sizes})
        loading.fill("text_encoder", model, file)

    with pytest.raises(UserError, match=r"no place for layers\.1\."):
        fill(num_hidden_layers=1)
    with pytest.raises(UserError, match=r"is \[64, 128\], not \[64, 96\]"):
        fill(intermediate_size=96)
    with pytest.raises(UserError, match=r"no tensor for layers\.2\..*12 are missing"):
        fill(num_hidden_layers=3)


# A published file given to a loader is loaded at the published size and checked first: the image
# encoder with its processor, 384x384 to -1..1.
def test_load_image_encoder_from_a_file(tmp_path: Path) -> None:
    processor, model = models.load_image_encoder(published("image_encoder", tmp_path / "siglip"))
    assert model.dtype == torch.float16 and model.config.num_hidden_layers == 27
    pixels = processor.preprocess(
        images=torch.full((50, 80, 3), 255, dtype=torch.uint8).numpy(), return_tensors="pt"
    )["pixel_values"]
    assert pixels.shape == (1, 3, 384, 384) and torch.all(pixels == 1)


# Every loader checks the header of a file before it reads a tensor.
@pytest.mark.parametrize("part", ["transformer", "vae", "image_encoder"])
def test_loaders_check_the_header_first(part: str, tmp_path: Path) -> None:
    load: Any = getattr(models, f"load_{part}")
    file = write_sparse(tmp_path / "w", {"a.weight": (10**6, 10**6)}, DTYPES[part])
    with pytest.raises(UserError, match=f"another model's file.*model.{part} must be"):
        load(file)
