"""The published files' names, and what musubi-tuner's own networks give for the same weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import encoder_inputs as given
import pytest
import torch
from conftest import TOP
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runner.core.errors import UserError
from runner.engines.diffusers import published
from runner.engines.diffusers import published_names as names
from runner.formats.published_layout import BYT5_LEAST_ROWS, layout

FIXTURE = TOP / "tests/fixtures/encoders.safetensors"
TOLERANCE = 1e-5

# Threads spend far more time waiting for each other than these small networks take.
torch.set_num_threads(1)


@cache
def recorded() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(FIXTURE), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# The recorder's name of each part, its names, and its reduced sizes.
PARTS: dict[str, tuple[str, names.Rename, dict[str, Any]]] = {
    "vae": ("vae", names.vae_name, given.VAE),
    "byt5": ("byt5", names.byt5_name, given.BYT5),
    "image_encoder": ("siglip", names.image_encoder_name, given.SIGLIP),
    "text_encoder": (
        "qwen",
        names.text_encoder_name,
        {
            **given.QWEN,
            "rope_parameters": {**given.QWEN_ROPE, "rope_theta": 1e6},
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        },
    ),
}


def recorded_shapes(part: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes that musubi's loader demands at full size."""
    shapes = json.loads(recorded()[1][f"{PARTS[part][0]}/shapes"])
    return {name: tuple(shape) for name, shape in shapes.items()}


def small(part: str, folder: Path) -> Any:
    """The part's network at the recorded size, filled from a file with the recorded weights."""
    recorders_name, rename, sizes = PARTS[part]
    file = folder / "weights.safetensors"
    rows = recorded_shapes("byt5")["shared.weight"][0]
    # The rows of ByT5 are taken from the file, which is not yet there.
    save_file({"shared.weight": torch.zeros(rows, 1)}, file)
    shapes = {n: tuple(p.shape) for n, p in published.build(part, file, **sizes).named_parameters()}
    theirs = {name: own for name in recorded_shapes(part) if (own := rename(name)) in shapes}
    weights = given.weights(recorders_name, {name: shapes[own] for name, own in theirs.items()})
    save_file({name: torch.from_numpy(value) for name, value in weights.items()}, file)
    model = published.build(part, file, **sizes)
    return published.fill(part, model, file, dtype=torch.float32)


# The layout that headers are checked against is what musubi's loaders demand at full size: whole
# for musubi itself, and for the embedded engine without the tensors that are not read.
@pytest.mark.parametrize("part", PARTS)
def test_the_layout_is_what_musubi_demands(part: str) -> None:
    theirs = recorded_shapes(part)
    assert layout(part, whole=True) == theirs
    unread = [name for name in theirs if PARTS[part][1](name) is None]
    assert all(name.startswith("visual.") or name == "lm_head.weight" for name in unread)
    wanted = {name: shape for name, shape in theirs.items() if name not in unread}
    if part == "byt5":
        assert wanted["shared.weight"][0] == 1510
        wanted["shared.weight"] = (BYT5_LEAST_ROWS, *wanted["shared.weight"][1:])
    assert layout(part) == wanted


def differs(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


# With equal weights in fp32 the VAE encodes and decodes as musubi's, and the encoders give its
# embeddings, padding or not.
@torch.no_grad()
def test_vae_is_musubis(tmp_path: Path) -> None:
    model, tensors = small("vae", tmp_path), recorded()[0]
    encoded = model.encode(torch.from_numpy(given.clip())).latent_dist.mode()
    assert differs(encoded, tensors["vae/encoded"]) < TOLERANCE
    decoded = model.decode(torch.from_numpy(given.latents())).sample
    assert differs(decoded, tensors["vae/decoded"]) < TOLERANCE


@torch.no_grad()
def test_byt5_is_musubis(tmp_path: Path) -> None:
    ids, mask = (torch.from_numpy(value)[:, : given.BYT5_LENGTH] for value in given.glyphs())
    states = small("byt5", tmp_path)(input_ids=ids, attention_mask=mask)[0]
    assert differs(states, recorded()[0]["byt5/states"]) < TOLERANCE


@torch.no_grad()
def test_siglip_is_musubis(tmp_path: Path) -> None:
    states = small("image_encoder", tmp_path)(
        pixel_values=torch.from_numpy(given.picture())
    ).last_hidden_state
    assert differs(states, recorded()[0]["siglip/states"]) < TOLERANCE


# musubi rounds Qwen2.5-VL's rotary frequencies to bfloat16 with its weights. With that undone, or
# done here too, both give the same; as they are, they differ by far more than rounding.
@torch.no_grad()
def test_qwen_is_musubis_but_for_its_rounded_frequencies(tmp_path: Path) -> None:
    model, tensors = small("text_encoder", tmp_path), recorded()[0]
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    ids, mask = (torch.from_numpy(value) for value in given.captions())

    def encode() -> list[Tensor]:
        states = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states[-3]
        rows = zip(states, given.QWEN_LENGTHS, strict=True)
        return [state[given.QWEN_CROP : length] for state, length in rows]

    exact = encode()
    frequencies = model.rotary_emb.inv_freq
    frequencies.copy_(frequencies.bfloat16())
    rounded = encode()
    for row in range(2):
        assert differs(exact[row], tensors[f"qwen/states_exact{row}"]) < TOLERANCE
        assert differs(rounded[row], tensors[f"qwen/states{row}"]) < TOLERANCE
        assert differs(exact[row], tensors[f"qwen/states{row}"]) > 10 * TOLERANCE


# A name of another file is refused by one line that says which file is meant.
@pytest.mark.parametrize(
    ("part", "name", "meant"),
    [
        ("vae", "encoder.down_blocks.0.resnets.0.norm1.gamma", "vae/diffusion_pytorch_model"),
        ("vae", "encoder.down.0.upsample.conv.conv.weight", "vae/diffusion_pytorch_model"),
        ("vae", "encoder.mid.attn_1.conv1.conv.weight", "vae/diffusion_pytorch_model"),
        ("text_encoder", "model.layers.0.self_attn.q_proj.scale_weight_", "qwen_2.5_vl_7b"),
        ("text_encoder", "scaled_fp8", "qwen_2.5_vl_7b"),
        ("text_encoder", "model.language_model.norm.weight", "qwen_2.5_vl_7b"),
        ("byt5", "decoder.final_layer_norm.weight", "byt5_small_glyphxl_fp16"),
        (
            "image_encoder",
            "text_model.embeddings.token_embedding.weight",
            "sigclip_vision_patch14_384",
        ),
    ],
)
def test_a_foreign_name_is_refused(part: str, name: str, meant: str) -> None:
    with pytest.raises(UserError, match=meant):
        PARTS[part][1](name)
