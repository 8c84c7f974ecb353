"""Weight names of the HunyuanVideo 1.5 transformer: Tencent's and diffusers'.

Tencent's checkpoints (``tencent/HunyuanVideo-1.5``) name the weights as its own code does;
``diffusers.HunyuanVideo15Transformer3DModel`` has the same weights under other names. Two tensors
differ in more than their name. The text refiner's attention is one fused ``self_attn_qkv`` (rows:
q, then k, then v), in diffusers three projections. The final layer's modulation gives shift before
scale, in diffusers scale before shift.

Importing this module costs milliseconds; torch is loaded only by the conversions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runner.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# The fourteen Linear modules of one double block, in the order Tencent's model declares them.
BLOCK_LINEARS: dict[str, str] = {
    "img_mod.linear": "norm1.linear",
    "img_attn_q": "attn.to_q",
    "img_attn_k": "attn.to_k",
    "img_attn_v": "attn.to_v",
    "img_attn_proj": "attn.to_out.0",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mod.linear": "norm1_context.linear",
    "txt_attn_q": "attn.add_q_proj",
    "txt_attn_k": "attn.add_k_proj",
    "txt_attn_v": "attn.add_v_proj",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}

_BLOCK_NORMS = {
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
}

_REFINER = {
    "norm1": "norm1",
    "self_attn_proj": "attn.to_out.0",
    "norm2": "norm2",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}

_OUTER = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}

_TENCENT_BLOCK = re.compile(r"double_blocks\.(\d+)\.(.+)")
_TENCENT_REFINER = re.compile(r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_DIFFUSERS_REFINER = re.compile(r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.(.+)")

_JOINED = re.compile(r"(double_blocks\.\d+\.(?:img|txt)_attn)_qkv\.(weight|bias)")

_BLOCK = {**BLOCK_LINEARS, **_BLOCK_NORMS}
_BLOCK_BACK = {ours: theirs for theirs, ours in _BLOCK.items()}
_REFINER_BACK = {ours: theirs for theirs, ours in _REFINER.items()}
_OUTER_BACK = {ours: theirs for theirs, ours in _OUTER.items()}
_SWAPPED = "final_layer.adaLN_modulation.1"
_FUSED = "self_attn_qkv"
_SPLIT = ("attn.to_q", "attn.to_k", "attn.to_v")


def apart(key: str) -> tuple[str, ...]:
    """Return Tencent's names of q, k and v for a block's joined tensor; none for another."""
    match = _JOINED.fullmatch(key)
    return tuple(f"{match[1]}_{part}.{match[2]}" for part in "qkv") if match else ()


def module_to_diffusers(module: str) -> str:
    """Return the diffusers name of a Tencent module, such as ``double_blocks.3.img_mlp.fc1``.

    Raises:
        UserError: the model has no such module, or it is the refiner's fused projection, which
            diffusers holds as three modules.
    """
    if match := _TENCENT_BLOCK.fullmatch(module):
        name = _BLOCK.get(match[2])
        return f"transformer_blocks.{match[1]}.{name}" if name else _unknown(module)
    if match := _TENCENT_REFINER.fullmatch(module):
        name = _REFINER.get(match[2])
        prefix = "context_embedder.token_refiner.refiner_blocks"
        return f"{prefix}.{match[1]}.{name}" if name else _unknown(module)
    return _OUTER.get(module) or _unknown(module)


def module_to_tencent(module: str) -> str:
    """Return Tencent's name of a diffusers module; the inverse of :func:`module_to_diffusers`.

    Raises:
        UserError: the model has no such module.
    """
    if match := _DIFFUSERS_BLOCK.fullmatch(module):
        name = _BLOCK_BACK.get(match[2])
        return f"double_blocks.{match[1]}.{name}" if name else _unknown(module)
    if match := _DIFFUSERS_REFINER.fullmatch(module):
        name = _REFINER_BACK.get(match[2])
        prefix = "txt_in.individual_token_refiner.blocks"
        return f"{prefix}.{match[1]}.{name}" if name else _unknown(module)
    return _OUTER_BACK.get(module) or _unknown(module)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Tencent's weights to diffusers' names, and take joined q, k and v apart.

    The input is not changed.

    Raises:
        UserError: a weight that is not HunyuanVideo 1.5's under Tencent's names.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if names := apart(key):
            parts = zip(names, tensor.chunk(3), strict=True)
            result.update(to_diffusers({name: part.contiguous() for name, part in parts}))
            continue
        module, _, leaf = key.rpartition(".")
        if module.endswith("." + _FUSED) and (match := _TENCENT_REFINER.fullmatch(module)):
            prefix = f"context_embedder.token_refiner.refiner_blocks.{match[1]}"
            for name, part in zip(_SPLIT, tensor.chunk(3), strict=True):
                result[f"{prefix}.{name}.{leaf}"] = part.contiguous()
            continue
        name = f"{module_to_diffusers(module)}.{leaf}"
        result[name] = _swap_halves(tensor) if module == _SWAPPED else tensor
    return result


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' weights to Tencent's names; the inverse of :func:`to_diffusers`.

    Raises:
        UserError: a weight that is not the diffusers model's, or a refiner projection without
            its two partners.
    """
    import torch

    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        match = _DIFFUSERS_REFINER.fullmatch(module)
        if match and match[2] in _SPLIT:
            stem = module[: -len(match[2])]
            parts = [state.get(f"{stem}{name}.{leaf}") for name in _SPLIT]
            whole = [part for part in parts if part is not None]
            if len(whole) != len(_SPLIT):
                raise UserError(
                    f"transformer weights: {stem}attn is missing one of to_q, to_k, to_v"
                )
            fused = f"txt_in.individual_token_refiner.blocks.{match[1]}.{_FUSED}.{leaf}"
            if match[2] == _SPLIT[0]:
                result[fused] = torch.cat(whole)
            continue
        name = f"{module_to_tencent(module)}.{leaf}"
        swap = name.startswith(_SWAPPED + ".")
        result[name] = _swap_halves(tensor) if swap else tensor
    return result


def _swap_halves(tensor: Tensor) -> Tensor:
    import torch

    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _unknown(module: str) -> str:
    raise UserError(
        f"transformer weights: {module!r} is not a module of HunyuanVideo 1.5; "
        "give Tencent's checkpoint (transformer/<resolution>_<task>)"
    )
