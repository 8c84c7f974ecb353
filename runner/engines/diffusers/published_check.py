"""Check the published weight files from their headers: names, shapes and dtypes; imports no torch.

The variants that are named are those that the same repositories, or users' folders, hold beside
the right files. None of their headers was seen either: Comfy-Org's joined q, k and v are what
musubi-tuner v0.3.4 looks for (``detect_hunyuan_video_1_5_sd_dtype``), the other names are those of
the models' public code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from runner.core.errors import UserError
from runner.core.text import counted
from runner.engines.diffusers.published_layout import layout
from runner.formats.dtypes import SAFETENSORS_NAMES
from runner.formats.lora import lora_name
from runner.formats.safetensors_header import TensorHeader, read_header

_TENCENT = "of tencent/HunyuanVideo-1.5"
_REPACKAGED = "of Comfy-Org/HunyuanVideo_1.5_repackaged"
# What each part is called, and the file that is right for it. The names are those of the options
# model.<part> and of WeightPaths.
_PARTS = {
    "transformer": (
        "transformer",
        f"transformer/<resolution>_<task>/diffusion_pytorch_model.safetensors {_TENCENT}",
    ),
    "vae": ("VAE", f"vae/diffusion_pytorch_model.safetensors {_TENCENT}"),
    "text_encoder": (
        "text encoder",
        f"split_files/text_encoders/qwen_2.5_vl_7b.safetensors {_REPACKAGED}",
    ),
    "byt5": (
        "ByT5 encoder",
        f"split_files/text_encoders/byt5_small_glyphxl_fp16.safetensors {_REPACKAGED}",
    ),
    "image_encoder": (
        "image encoder",
        f"split_files/clip_vision/sigclip_vision_patch14_384.safetensors {_REPACKAGED}",
    ),
}
# Tensors that may be in the file and are not read.
_UNREAD = {
    "text_encoder": ("visual.", "lm_head.weight"),
    "byt5": ("encoder.embed_tokens.weight",),
}

_LORA = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1_a", ".lokr_w1")
# The matrices of a LoRA or LoHa that have a layer's inputs as columns, and its outputs as rows.
_LORA_INPUTS = ("lora_down.weight", "hada_w1_b")
_LORA_OUTPUTS = ("lora_up.weight", "hada_w1_a")
_SCALES = ("scale_weight", "weight_scale", "scaled_fp8")
# Parts of names by which another variant or model is known; all must occur, the first row counts.
_VARIANTS = (
    (("single_blocks.", "img_attn_qkv."), "is the transformer of HunyuanVideo 1.0"),
    (("double_blocks.", "img_attn_qkv."), "is Comfy-Org's repackaged transformer (joined q, k, v)"),
    (("transformer_blocks.", "attn.to_q."), "has diffusers' names instead of Tencent's"),
    (("encoder.down_blocks.", "decoder.up_blocks."), "has diffusers' names instead of Tencent's"),
    (("blocks.0.self_attn.q.", "blocks.0.ffn."), "is the transformer of a Wan model"),
    (("decoder.upsamples.", "encoder.downsamples."), "is the VAE of a Wan model"),
    (("double_blocks.", "guidance_in."), "is a distilled transformer (guidance_in)"),
    (("double_blocks.", "time_r_in."), "is a distilled transformer (time_r_in)"),
    (("language_model.", "layers."), "has transformers' names, not those of the repackaged file"),
)


def check_file(part: str, path: Path) -> None:
    """Check that a file has the tensors of a published part; only its header is read.

    Args:
        part: transformer, vae, text_encoder, byt5 or image_encoder.
        path: the file.

    Raises:
        DamagedFileError: the file is cut, or is no safetensors file.
        UserError: it is another variant or another model's.
    """
    if wrong := _difference(part, read_header(path)):
        raise UserError(f"{path} {wrong}: model.{part} must be {_PARTS[part][1]}.")


def check_lora(path: Path) -> None:
    """Check that a LoRA's matrices fit the published transformer; only its header is read.

    Raises:
        DamagedFileError: the file is cut, or is no safetensors file.
        UserError: it was trained on another model.
    """
    layers = {
        lora_name(name.removesuffix(".weight")): shape
        for name, shape in layout("transformer").items()
    }
    for name, tensor in read_header(path).items():
        module, _, leaf = name.partition(".")
        if leaf not in _LORA_INPUTS + _LORA_OUTPUTS:
            continue
        shape, layer = tensor.shape, layers.get(module, ())
        side = slice(1, None) if leaf in _LORA_INPUTS else slice(1)
        fits = len(shape) > 1 and shape[side] == layer[side]
        if not fits:
            raise UserError(
                f"network.weights={path} is a LoRA for another model: {name} is {list(shape)}, "
                "which fits no layer of that name in HunyuanVideo 1.5."
            )


def _difference(part: str, header: Mapping[str, TensorHeader]) -> str | None:
    """Say what a header has otherwise than the published part, or None."""
    if known := _variant(part, header):
        return known
    wanted, unread = layout(part), _UNREAD.get(part, ())
    if part == "byt5":
        # As musubi-tuner, which takes this prefix off before it compares.
        header = {_with_prefix(name): tensor for name, tensor in header.items()}
    what = f"HunyuanVideo 1.5's {_PARTS[part][0]}"
    missing = [name for name in wanted if name not in header]
    if len(missing) == len(wanted):
        return f"is another model's file, with none of the tensors of {what}"
    if missing:
        some = f"{len(missing)} of the {len(wanted)} tensors"
        return f"lacks {some} of {what}, such as {missing[0]}"
    for name, shape in wanted.items():
        found = header[name].shape
        if part == "byt5" and name == "shared.weight":
            # Rows of the vocabulary, more than the tokenizer's where others were added.
            found = (min(found[0], shape[0]), *found[1:]) if found else found
        if found != shape:
            return f"is not {what}: {name} is {list(header[name].shape)}, not {list(shape)}"
    more = [name for name in header if name not in wanted and not name.startswith(unread)]
    if more:
        return f"has {counted(len(more), 'tensor')} that {what} has not, such as {more[0]}"
    return None


def _variant(part: str, header: Mapping[str, TensorHeader]) -> str | None:
    """Name the known wrong variant that a header is of, if any."""
    if any(mark in name for name in header for mark in _LORA):
        return "is a LoRA, and no model (a LoRA to start from is network.weights)"
    dtypes = {tensor.dtype for tensor in header.values()}
    scaled = any(mark in name for name in header for mark in _SCALES)
    if scaled or any(dtype.startswith("F8") for dtype in dtypes):
        return "is stored in fp8"
    if foreign := sorted(dtypes.difference(SAFETENSORS_NAMES)):
        return f"has tensors in {foreign[0]}, not in bf16, fp16 or fp32"
    for other, (what, _) in _PARTS.items():
        if other != part and layout(other).keys() <= header.keys():
            return f"is the {what}, not the {_PARTS[part][0]}"
    return next((text for marks, text in _VARIANTS if _occur(marks, header)), None)


def _occur(marks: Collection[str], names: Collection[str]) -> bool:
    return all(any(mark in name for name in names) for mark in marks)


def _with_prefix(name: str) -> str:
    return name if name.startswith(("encoder.", "shared.", "decoder.")) else f"encoder.{name}"
