"""Map the weight names of the published VAE and encoders to diffusers' and transformers'.

The files are those musubi-tuner v0.3.4 loads: Tencent's VAE (``tencent/HunyuanVideo-1.5``,
``vae/diffusion_pytorch_model.safetensors``) and Comfy-Org's repackaged Qwen2.5-VL, ByT5 and SigLIP
(``Comfy-Org/HunyuanVideo_1.5_repackaged``, ``split_files/``). Their headers were not seen here: the
names are those that musubi's loaders, which are strict, demand of them. The classes are
AutoencoderKLHunyuanVideo15 (diffusers 0.42), Qwen2_5_VLTextModel, T5EncoderModel and
SiglipVisionModel (transformers 5.23). The transformer's names are in
:mod:`runner.formats.transformer_keys`.

Each function takes one name and gives one, so that a file can be read tensor by tensor; None is a
tensor that the class does without, which then need not be read at all. No tensor here changes its
shape or its order. ``docs/development/full-size-truth.md`` says how this was proven.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from runner.core.errors import UserError

# A name of the file to the class's name; None where the class has no use for the tensor.
Rename = Callable[[str], str | None]

_VAE_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)")
_VAE_RESNET = re.compile(r"block\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block_1|block_2|attn_1)\.(.+)")
_VAE_OUTER = re.compile(r"(encoder|decoder)\.(norm_out\.gamma|conv_(in|out)\.conv\.(weight|bias))")
_VAE_RESNET_PART = re.compile(r"norm[12]\.gamma|conv[12]\.conv\.(weight|bias)")
_VAE_SHORTCUT = re.compile(r"nin_shortcut\.(weight|bias)")
_VAE_RESAMPLE = re.compile(r"(downsample|upsample)\.conv\.conv\.(weight|bias)")
_VAE_ATTENTION = re.compile(r"(q|k|v|proj_out)\.(weight|bias)")

_VAE_LEVELS = {"encoder.down": "encoder.down_blocks", "decoder.up": "decoder.up_blocks"}
_VAE_SAMPLERS = {"downsample": "downsamplers.0", "upsample": "upsamplers.0"}
_VAE_MIDDLES = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
_VAE_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "proj_out"}

_QWEN = re.compile(
    r"model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\."
    r"((input|post_attention)_layernorm\.weight"
    r"|self_attn\.([qkv]_proj\.(weight|bias)|o_proj\.weight)"
    r"|mlp\.(gate|up|down)_proj\.weight))"
)
_BYT5 = re.compile(r"(encoder\.)?(block\.\d+\.layer\.[01]\..+|final_layer_norm\.weight)")
_SIGLIP = re.compile(r"vision_model\.((embeddings|encoder|post_layernorm|head)\..+)")


def vae_name(name: str) -> str:
    """Return diffusers' name of a tensor of Tencent's VAE.

    Raises:
        UserError: Tencent's VAE has no such tensor.
    """
    if match := _VAE_LEVEL.fullmatch(name):
        level = f"{_VAE_LEVELS[match[1]]}.{match[2]}"
        if (resnet := _VAE_RESNET.fullmatch(match[3])) and (part := _resnet_part(resnet[2])):
            return f"{level}.resnets.{resnet[1]}.{part}"
        sampler = _VAE_RESAMPLE.fullmatch(match[3])
        if sampler and (sampler[1] == "downsample") == (match[1] == "encoder.down"):
            return f"{level}.{_VAE_SAMPLERS[sampler[1]]}.conv.conv.{sampler[2]}"
    elif match := _VAE_MIDDLE.fullmatch(name):
        attention = match[2] == "attn_1"
        if part := _attention_part(match[3]) if attention else _resnet_part(match[3]):
            return f"{match[1]}.mid_block.{_VAE_MIDDLES[match[2]]}.{part}"
    elif _VAE_OUTER.fullmatch(name):
        return name
    raise UserError(
        f"VAE weights: {name!r} is no tensor of Tencent's HunyuanVideo 1.5 VAE; "
        "give its vae/diffusion_pytorch_model.safetensors, not a repackaged one"
    )


def text_encoder_name(name: str) -> str | None:
    """Return Qwen2_5_VLTextModel's name of a tensor of the repackaged Qwen2.5-VL.

    Returns:
        The name, or None for the vision tower and the language head: a caption's encoding has no
        use for them.

    Raises:
        UserError: the whole model has no such tensor.
    """
    if match := _QWEN.fullmatch(name):
        return match[1]
    if name.startswith("visual.") or name == "lm_head.weight":
        return None
    raise UserError(
        f"text encoder weights: {name!r} is no tensor of Qwen2.5-VL as repackaged; "
        "give split_files/text_encoders/qwen_2.5_vl_7b.safetensors, not its fp8 form"
    )


def byt5_name(name: str) -> str | None:
    """Return T5EncoderModel's name of a tensor of the repackaged ByT5.

    The class holds ``encoder.embed_tokens`` beside ``shared``; whoever fills it must make the two
    one.

    Returns:
        The name, or None for a second copy of the embedding.

    Raises:
        UserError: the encoder has no such tensor.
    """
    if match := _BYT5.fullmatch(name):
        return f"encoder.{match[2]}"
    if name == "shared.weight":
        return name
    if name in ("encoder.embed_tokens.weight", "embed_tokens.weight"):
        return None
    raise UserError(
        f"ByT5 weights: {name!r} is no tensor of the glyph encoder as repackaged; "
        "give split_files/text_encoders/byt5_small_glyphxl_fp16.safetensors"
    )


def image_encoder_name(name: str) -> str:
    """Return SiglipVisionModel's name of a tensor of the repackaged SigLIP.

    Raises:
        UserError: the vision model has no such tensor.
    """
    if match := _SIGLIP.fullmatch(name):
        return match[1]
    raise UserError(
        f"image encoder weights: {name!r} is no tensor of SigLIP as repackaged; "
        "give split_files/clip_vision/sigclip_vision_patch14_384.safetensors"
    )


def _resnet_part(part: str) -> str | None:
    if _VAE_RESNET_PART.fullmatch(part):
        return part
    match = _VAE_SHORTCUT.fullmatch(part)
    return f"conv_shortcut.{match[1]}" if match else None


def _attention_part(part: str) -> str | None:
    if part == "norm.gamma":
        return part
    match = _VAE_ATTENTION.fullmatch(part)
    return f"{_VAE_PROJECTIONS[match[1]]}.{match[2]}" if match else None
