"""The headers of weight files: the published ones pass, each wrong variant is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)
from sparse_weights import DTYPES, joined, published, write_sparse

from runner.core.errors import UserError
from runner.formats.published_check import check_file, check_lora
from runner.formats.published_layout import Layout, layout
from runner.formats.safetensors_header import DamagedFileError
from runner.formats.transformer_keys import from_diffusers


# The transformer's layout is that of diffusers' class at its published size. (The other parts':
# test_published_names.py.)
def test_the_transformers_layout_is_the_classs() -> None:
    with torch.device("meta"):
        state = from_diffusers(HunyuanVideo15Transformer3DModel().state_dict())
    assert layout("transformer") == {name: tuple(value.shape) for name, value in state.items()}


# A file with exactly the published tensors passes, in any of the three float dtypes; so do tensors
# that nothing reads, ByT5's added rows, and its names without their prefix.
@pytest.mark.parametrize("part", DTYPES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_published_layout_passes(part: str, dtype: str, tmp_path: Path) -> None:
    check_file(part, write_sparse(tmp_path / "w", layout(part), dtype))


def test_what_is_not_read_passes(tmp_path: Path) -> None:
    vision = {"visual.blocks.0.norm1.weight": (1280,), "lm_head.weight": (152064, 3584)}
    shapes = {**layout("text_encoder"), **vision}
    check_file("text_encoder", write_sparse(tmp_path / "qwen", shapes, "BF16"))
    shapes = {name.removeprefix("encoder."): shape for name, shape in layout("byt5").items()}
    shapes |= {"shared.weight": (1510, 1472), "embed_tokens.weight": (1510, 1472)}
    check_file("byt5", write_sparse(tmp_path / "byt5", shapes, "F16"))


# Comfy-Org's repackaged transformer, with q, k and v in one, passes for every engine.
@pytest.mark.parametrize("whole", [False, True])
def test_joined_projections_pass(tmp_path: Path, whole: bool) -> None:
    check_file("transformer", write_sparse(tmp_path / "w", joined(), "F16"), whole=whole)


# musubi-tuner loads strictly what nothing computes with too: those tensors have to be there, and
# ByT5's embedding has to have the rows that it adds tokens for.
def test_what_only_musubi_reads(tmp_path: Path) -> None:
    for part in DTYPES:
        file = write_sparse(tmp_path / part, layout(part, whole=True), DTYPES[part])
        check_file(part, file, whole=True)
        check_file(part, file)
    with pytest.raises(UserError, match=r"lacks 391 of the 729 tensors .* such as lm_head\.weight"):
        check_file("text_encoder", published("text_encoder", tmp_path / "qwen"), whole=True)
    with pytest.raises(UserError, match=r"shared\.weight is \[384, 1472\], not \[1510, 1472\]"):
        check_file("byt5", published("byt5", tmp_path / "byt5"), whole=True)
    rows = {**layout("byt5"), "shared.weight": (1600, 1472)}
    check_file("byt5", write_sparse(tmp_path / "rows", rows, "F16"))
    with pytest.raises(UserError, match=r"shared\.weight is \[1600, 1472\], not \[1510, 1472\]"):
        check_file("byt5", tmp_path / "rows", whole=True)
    more = {**layout("text_encoder", whole=True), "visual.blocks.32.norm1.weight": (1280,)}
    check_file("text_encoder", write_sparse(tmp_path / "more", more, "BF16"))
    with pytest.raises(UserError, match=r"has 1 tensor that .* such as visual\.blocks\.32"):
        check_file("text_encoder", tmp_path / "more", whole=True)


def renamed(part: str, *changes: tuple[str, str]) -> Layout:
    result = layout(part)
    for old, new in changes:
        result = {name.replace(old, new): shape for name, shape in result.items()}
    return result


def without(part: str, *texts: str) -> Layout:
    return {n: shape for n, shape in layout(part).items() if not any(t in n for t in texts)}


_TRANSFORMER = (
    "model.transformer must be transformer/<resolution>_<task>/diffusion_pytorch_model.safetensors "
    "of tencent/HunyuanVideo-1.5."
)
_VAE = "model.vae must be vae/diffusion_pytorch_model.safetensors of tencent/HunyuanVideo-1.5."
_QWEN = (
    "model.text_encoder must be split_files/text_encoders/qwen_2.5_vl_7b.safetensors of "
    "Comfy-Org/HunyuanVideo_1.5_repackaged."
)
_BYT5 = (
    "model.byt5 must be split_files/text_encoders/byt5_small_glyphxl_fp16.safetensors of "
    "Comfy-Org/HunyuanVideo_1.5_repackaged."
)
_SIGLIP = (
    "model.image_encoder must be split_files/clip_vision/sigclip_vision_patch14_384.safetensors of "
    "Comfy-Org/HunyuanVideo_1.5_repackaged."
)

LORA: Layout = {
    "lora_unet_double_blocks_0_img_attn_q.lora_down.weight": (32, 2048),
    "lora_unet_double_blocks_0_img_attn_q.lora_up.weight": (2048, 32),
    "lora_unet_double_blocks_0_img_attn_q.alpha": (),
}
WAN: Layout = {
    "blocks.0.self_attn.q.weight": (5120, 5120),
    "blocks.0.ffn.0.weight": (13824, 5120),
    "patch_embedding.weight": (5120, 16, 1, 2, 2),
}
FP8: Layout = {"scaled_fp8": (0,), "model.layers.0.mlp.up_proj.scale_weight": ()}
MANY = {"single_blocks.0.linear1.weight": (21504, 3072), **joined()}
SHARD = without("text_encoder", ".27.")
SMALL_QWEN = {**layout("text_encoder"), "model.embed_tokens.weight": (151936, 2048)}
WIDE = {**layout("transformer"), "img_in.proj.weight": (2048, 98, 1, 1, 1)}

WRONG: dict[str, tuple[str, Layout, str, str, str]] = {
    "comfy with prefix": (
        "transformer", {f"model.diffusion_model.{n}": s for n, s in joined().items()}, "BF16",
        "has the names of a ComfyUI checkpoint (model.diffusion_model.)", _TRANSFORMER,
    ),
    "joined, and too small": (
        "transformer", {**joined(), "double_blocks.7.txt_attn_qkv.bias": (3072,)}, "BF16",
        "is not HunyuanVideo 1.5's transformer: double_blocks.7.txt_attn_q.bias is [1024], not "
        "[2048]", _TRANSFORMER,
    ),
    "fp8 transformer": (
        "transformer", layout("transformer"), "F8_E4M3", "is stored in fp8", _TRANSFORMER,
    ),
    "8 bit": (
        "transformer", layout("transformer"), "I8",
        "has tensors in I8, not in bf16, fp16 or fp32", _TRANSFORMER,
    ),
    "HunyuanVideo 1.0": (
        "transformer", MANY, "BF16", "is the transformer of HunyuanVideo 1.0", _TRANSFORMER,
    ),
    "Wan": ("transformer", WAN, "BF16", "is the transformer of a Wan model", _TRANSFORMER),
    "LoRA": (
        "transformer", LORA, "BF16",
        "is a LoRA, and no model (a LoRA to start from is network.weights)", _TRANSFORMER,
    ),
    "diffusers' transformer": (
        "transformer", {"transformer_blocks.0.attn.to_q.weight": (2048, 2048)}, "BF16",
        "has diffusers' names instead of Tencent's", _TRANSFORMER,
    ),
    "distilled": (
        "transformer", {**layout("transformer"), "time_r_in.mlp.0.weight": (2048, 256)}, "BF16",
        "is a distilled transformer (time_r_in)", _TRANSFORMER,
    ),
    "super-resolution": (
        "transformer", WIDE, "BF16",
        "is not HunyuanVideo 1.5's transformer: img_in.proj.weight is [2048, 98, 1, 1, 1], not "
        "[2048, 65, 1, 1, 1]", _TRANSFORMER,
    ),
    "the VAE": (
        "transformer", layout("vae"), "F16", "is the VAE, not the transformer", _TRANSFORMER,
    ),
    "diffusers' VAE": (
        "vae", renamed("vae", ("r.down.", "r.down_blocks."), ("r.up.", "r.up_blocks.")), "F16",
        "has diffusers' names instead of Tencent's", _VAE,
    ),
    "Wan VAE": (
        "vae", {"decoder.upsamples.0.gamma": (9,), "encoder.downsamples.0.gamma": (9,)}, "F32",
        "is the VAE of a Wan model", _VAE,
    ),
    "VAE without decoder": (
        "vae", without("vae", "decoder."), "F16",
        "lacks 124 of the 218 tensors of HunyuanVideo 1.5's VAE, such as "
        "decoder.conv_in.conv.weight", _VAE,
    ),
    "fp8 scaled text encoder": (
        "text_encoder", {**layout("text_encoder"), **FP8}, "BF16", "is stored in fp8", _QWEN,
    ),
    "fp8 text encoder": (
        "text_encoder", layout("text_encoder"), "F8_E4M3", "is stored in fp8", _QWEN,
    ),
    "transformers' text encoder": (
        "text_encoder", renamed("text_encoder", ("model.", "model.language_model.")), "BF16",
        "has transformers' names, not those of the repackaged file", _QWEN,
    ),
    "a shard": (
        "text_encoder", SHARD, "BF16",
        "lacks 12 of the 338 tensors of HunyuanVideo 1.5's text encoder, such as "
        "model.layers.27.input_layernorm.weight", _QWEN,
    ),
    "a smaller Qwen2.5-VL": (
        "text_encoder", SMALL_QWEN, "BF16",
        "is not HunyuanVideo 1.5's text encoder: model.embed_tokens.weight is [151936, 2048], not "
        "[152064, 3584]", _QWEN,
    ),
    "byt5 with decoder": (
        "byt5", {**layout("byt5"), "decoder.final_layer_norm.weight": (1472,)}, "F16",
        "has 1 tensor that HunyuanVideo 1.5's ByT5 encoder has not, such as "
        "decoder.final_layer_norm.weight", _BYT5,
    ),
    "byt5 is the image encoder": (
        "byt5", layout("image_encoder"), "F16", "is the image encoder, not the ByT5 encoder", _BYT5,
    ),
    "too few rows": (
        "byt5", {**layout("byt5"), "shared.weight": (300, 1472)}, "F16",
        "is not HunyuanVideo 1.5's ByT5 encoder: shared.weight is [300, 1472], not [384, 1472]",
        _BYT5,
    ),
    "another model": (
        "image_encoder", {"text_model.final_layer_norm.weight": (768,)}, "F16",
        "is another model's file, with none of the tensors of HunyuanVideo 1.5's image encoder",
        _SIGLIP,
    ),
}  # fmt: skip


# Each wrong variant is one line: what the file is, and which is wanted by which option.
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_variant_is_named(name: str, tmp_path: Path) -> None:
    part, shapes, dtype, line, wanted = WRONG[name]
    file = write_sparse(tmp_path / "w.safetensors", shapes, dtype)
    with pytest.raises(UserError) as error:
        check_file(part, file)
    assert str(error.value) == f"{file} {line}: {wanted}"


# A single tensor in fp8 among others makes the file a quantised one.
def test_one_tensor_in_fp8(tmp_path: Path) -> None:
    one = {"double_blocks.3.img_mlp.fc1.weight": "F8_E4M3"}
    file = write_sparse(tmp_path / "w", layout("transformer"), "BF16", dtypes=one)
    with pytest.raises(UserError, match="is stored in fp8"):
        check_file("transformer", file)


# A file that is cut is said to be cut, and not another model's.
def test_a_cut_file(tmp_path: Path) -> None:
    file = published("vae", tmp_path / "vae.safetensors")
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 12345)
    with pytest.raises(DamagedFileError, match="12,345 bytes are missing"):
        check_file("vae", file)


# A LoRA's matrices must fit the layers that they are for, before it is loaded after all caching.
@pytest.mark.parametrize(
    "leaves", [("lora_down.weight", "lora_up.weight"), ("hada_w1_b", "hada_w1_a")]
)
@pytest.mark.parametrize(
    ("module", "inputs", "outputs", "wrong"),
    [
        ("double_blocks_0_img_attn_q", 2048, 2048, None),
        ("double_blocks_53_txt_mlp_fc2", 8192, 2048, None),
        ("double_blocks_0_img_attn_q", 3072, 2048, "inputs"),
        ("double_blocks_0_img_mlp_fc1", 2048, 2048, "outputs"),
        ("double_blocks_54_img_attn_q", 2048, 2048, "inputs"),
    ],
)
def test_a_lora_fits_the_transformer(
    module: str,
    inputs: int,
    outputs: int,
    wrong: str | None,
    leaves: tuple[str, str],
    tmp_path: Path,
) -> None:
    down, up = (f"lora_unet_{module}.{leaf}" for leaf in leaves)
    file = write_sparse(tmp_path / "lora", {down: (32, inputs), up: (outputs, 32)}, "F32")
    if wrong is None:
        check_lora(file)
        return
    with pytest.raises(UserError) as error:
        check_lora(file)
    found = f"{down} is [32, {inputs}]" if wrong == "inputs" else f"{up} is [{outputs}, 32]"
    assert str(error.value) == (
        f"network.weights={file} is a LoRA for another model: {found}, which fits no layer of that "
        "name in HunyuanVideo 1.5."
    )


# A matrix that is none fits nothing.
@pytest.mark.parametrize("leaf", ["lora_down.weight", "lora_up.weight"])
def test_a_matrix_that_is_none(leaf: str, tmp_path: Path) -> None:
    for module in ("double_blocks_0_img_attn_q", "other"):
        file = write_sparse(tmp_path / "lora", {f"lora_unet_{module}.{leaf}": ()}, "F32")
        with pytest.raises(UserError, match=r"is \[\], which fits no layer"):
            check_lora(file)
