"""LoRA files: musubi-tuner's names, and the conversion to ComfyUI's and back.

Keys are ``lora_unet_double_blocks_<n>_<module>.{lora_down.weight,lora_up.weight,alpha}``, where the
module is one of Tencent's fourteen Linears of a double block, with ``_`` for ``.``. ComfyUI's
network has q, k and v in one Linear and other names for three modules; the conversion, its tripled
alpha and its hashes are those of musubi-tuner v0.3.4's converter for this model. That converter
does not handle LoHa and LoKr: their conversion follows from what ComfyUI's weight adapters compute
(``comfy/weight_adapter/loha.py``, ``lokr.py``): (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank, and
kron(w1, w2).

Importing this module costs milliseconds; torch and safetensors are loaded by the conversions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from runner.core.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Metadata = dict[str, str]

_PREFIX = "lora_unet_"
_NAME = re.compile(r"lora_unet_double_blocks_(\d+)_(.+)")
_COMFYUI = {
    "img_mlp_fc1": "img_mlp_0",
    "img_mlp_fc2": "img_mlp_2",
    "img_mod_linear": "img_mod_lin",
    "txt_mlp_fc1": "txt_mlp_0",
    "txt_mlp_fc2": "txt_mlp_2",
    "txt_mod_linear": "txt_mod_lin",
}
_MUSUBI = {theirs: ours for ours, theirs in _COMFYUI.items()}
_JOINED = re.compile(r"(img|txt)_attn_(q|k|v)")
# The tensors that identify a file's adapter, and which of their dimensions is the rank.
_RANK_OF = {"lora_down.weight": ("lora", 0), "hada_w1_b": ("loha", 0), "lokr_w2_a": ("lokr", 1)}
_LEAVES = ("lora_down.weight", "lora_up.weight", "alpha")
# The tensors of a module of each adapter. A LoKr's second factor is one full matrix if the rank is
# not smaller than it.
_ADAPTER_OF_LEAVES = {
    frozenset(_LEAVES): "lora",
    frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")): "loha",
    frozenset(("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")): "lokr",
    frozenset(("lokr_w1", "lokr_w2", "alpha")): "lokr",
}
# The matrices [rank, in] and [out, rank] whose product is an update, or a factor of it.
_PAIRS = {
    "lora": (_LEAVES[:2],),
    "loha": (("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")),
}


def lora_name(module: str) -> str:
    """Name a Tencent module such as ``double_blocks.0.img_mlp.fc1`` as LoRA files do."""
    return _PREFIX + module.replace(".", "_")


def sshs_hashes(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Metadata:
    """Compute the two hashes by which web interfaces identify a LoRA file.

    Both are over the file as saved with only its ``ss_`` metadata: ``sshs_model_hash`` is the
    SHA-256 of the tensor bytes, ``sshs_legacy_hash`` the first eight digits of the SHA-256 of the
    64 KiB at 1 MiB.
    """
    from safetensors.torch import save

    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = save(dict(state), kept)
    header = int.from_bytes(data[:8], "little") + 8
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


class LoraInfo(NamedTuple):
    """The adapter in a LoRA file (lora, loha or lokr), its rank and its alpha."""

    kind: str
    rank: int
    alpha: float


def describe(file: Path) -> LoraInfo:
    """Describe a LoRA file with musubi-tuner's names, without loading all of it.

    Raises:
        UserError: it can't be read, or is not such a file (the message names a file of ComfyUI's).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            keys = list(handle.keys())
            names = {match[2] for key in keys if (match := _NAME.fullmatch(key.partition(".")[0]))}
            if any(name in _MUSUBI or name.endswith("_qkv") for name in names):
                raise UserError(
                    f"{file} is a LoRA for ComfyUI: take the lora.safetensors beside it"
                )
            for key in keys:
                name, _, leaf = key.partition(".")
                if _NAME.fullmatch(name) and leaf in _RANK_OF:
                    kind, side = _RANK_OF[leaf]
                    rank = handle.get_slice(key).get_shape()[side]
                    alpha = f"{name}.alpha"
                    scale = float(handle.get_tensor(alpha)) if alpha in keys else float(rank)
                    return LoraInfo(kind, rank, scale)
            for key in keys:
                name, _, leaf = key.partition(".")
                if _NAME.fullmatch(name) and leaf == "lokr_w2" and f"{name}.alpha" in keys:
                    # With a full second factor, musubi-tuner writes the rank as alpha; it does not
                    # scale the update.
                    scale = float(handle.get_tensor(f"{name}.alpha"))
                    return LoraInfo("lokr", round(scale), scale)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} can't be read as a LoRA file: {error}") from None
    except (IndexError, RuntimeError, ValueError):
        raise UserError(f"{file} can't be read as a LoRA file: a tensor's shape is wrong") from None
    raise UserError(f"{file} is not a LoRA of this model")


def to_comfyui(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], Metadata | None]:
    """Convert musubi-tuner's file for ComfyUI.

    q, k and v are joined into ``_qkv``: their downs stacked [3r, in], their ups as blocks on the
    diagonal [3 * out, 3r], and alpha tripled like the rank; both pairs of a LoHa likewise. Three
    Kronecker products cannot be joined into one, so LoKr updates are expanded to one full matrix
    [3 * out, in], with a w1 of 1. One of the three that was not trained counts as zero. The hashes
    are computed again.

    Returns:
        The tensors, and the metadata; None if the file had none.

    Raises:
        UserError: not a LoRA of this model, or one whose q, k and v differ in rank or alpha.
    """
    result: dict[str, Tensor] = {}
    joined: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, leaves in _grouped(state, "to ComfyUI", ("lora", "loha", "lokr")).items():
        match = _NAME.fullmatch(name)
        module = match[2] if match else ""
        if part := _JOINED.fullmatch(module):
            stem = name.removesuffix(f"_{part[2]}")
            joined.setdefault(stem, {})[part[2]] = leaves
            continue
        target = name.removesuffix(module) + _COMFYUI.get(module, module) if match else name
        result.update({f"{target}.{leaf}": tensor for leaf, tensor in leaves.items()})
    for stem, parts in joined.items():
        result.update({f"{stem}_qkv.{leaf}": t for leaf, t in _join(stem, parts).items()})
    return result, _with_hashes(result, metadata)


def from_comfyui(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], Metadata | None]:
    """Convert ComfyUI's file for musubi-tuner; the inverse of :func:`to_comfyui`.

    Raises:
        UserError: not a LoRA or LoHa of this model.
    """
    result: dict[str, Tensor] = {}
    for name, leaves in _grouped(state, "from ComfyUI", ("lora", "loha")).items():
        match = _NAME.fullmatch(name)
        module = match[2] if match else ""
        if module in ("img_attn_qkv", "txt_attn_qkv"):
            for index, part in enumerate("qkv"):
                stem = f"{name.removesuffix('qkv')}{part}"
                for down, up in _PAIRS[_ADAPTER_OF_LEAVES[frozenset(leaves)]]:
                    rows = leaves[down].chunk(3, dim=0)[index]
                    rank = rows.shape[0]
                    block = leaves[up].chunk(3, dim=0)[index][:, index * rank : (index + 1) * rank]
                    result[f"{stem}.{down}"] = rows.contiguous()
                    result[f"{stem}.{up}"] = block.contiguous()
                result[f"{stem}.alpha"] = leaves["alpha"] / 3
            continue
        target = name.removesuffix(module) + _MUSUBI.get(module, module) if match else name
        result.update({f"{target}.{leaf}": tensor for leaf, tensor in leaves.items()})
    return result, _with_hashes(result, metadata)


def _grouped(
    state: Mapping[str, Tensor], direction: str, adapters: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """Group tensors by module name, then leaf; refuse incomplete modules and other adapters."""
    result: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, leaf = key.partition(".")
        result.setdefault(name, {})[leaf] = tensor
    for name, leaves in result.items():
        adapter = _ADAPTER_OF_LEAVES.get(frozenset(leaves))
        if adapter is None:
            raise UserError(
                f"LoRA file: {name!r} has {sorted(leaves)}, but a module has {sorted(_LEAVES)}, "
                "or all tensors of a LoHa or LoKr"
            )
        if adapter not in adapters:
            raise UserError(
                f"LoRA file: {name!r} is of network={adapter}, and conversion {direction} covers "
                f"{' and '.join(adapters)}"
            )
    return result


def _join(stem: str, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join q, k and v into one module."""
    import torch

    first = next(iter(parts.values()))
    adapter = _ADAPTER_OF_LEAVES[frozenset(first)]
    if any(_ADAPTER_OF_LEAVES[frozenset(other)] != adapter for other in parts.values()):
        raise UserError(f"LoRA file: q, k and v of {stem!r} are different adapters")
    if adapter == "lokr":
        updates = {part: kronecker(leaves) for part, leaves in parts.items()}
        zero = torch.zeros_like(next(iter(updates.values())))
        whole = torch.cat([updates.get(part, zero) for part in "qkv"])
        dtype = first["lokr_w1"].dtype
        one = torch.ones((1, 1), dtype=dtype)
        return {
            "lokr_w1": one,
            "lokr_w2": whole.to(dtype),
            "alpha": torch.ones_like(first["alpha"]),
        }
    for other in parts.values():
        same_shape = all(other[leaf].shape == first[leaf].shape for leaf in first)
        if not same_shape or float(other["alpha"]) != float(first["alpha"]):
            raise UserError(f"LoRA file: q, k and v of {stem!r} differ in rank or alpha")
    result = {}
    for down, up in _PAIRS[adapter]:
        rank, rows = first[down].shape[0], first[up].shape[0]
        downs = first[down].new_zeros((3 * rank, first[down].shape[1]))
        ups = torch.zeros((3 * rows, 3 * rank), dtype=first[down].dtype, device=first[down].device)
        for index, part in enumerate("qkv"):
            if part in parts:
                downs[index * rank : (index + 1) * rank] = parts[part][down]
                block = parts[part][up]
                ups[index * rows : (index + 1) * rows, index * rank : (index + 1) * rank] = block
        result.update({down: downs, up: ups})
    return {**result, "alpha": first["alpha"] * 3}


def kronecker(leaves: Mapping[str, Tensor]) -> Tensor:
    """Compute the update [out, in] of a LoKr module in float32: kron(w1, w2) * scale.

    The scale is alpha / rank, or 1 if w2 is one full matrix, in musubi-tuner (networks/lokr.py) and
    in ComfyUI.
    """
    import torch

    scale, second = 1.0, leaves.get("lokr_w2")
    if second is None:
        up, down = leaves["lokr_w2_a"].float(), leaves["lokr_w2_b"].float()
        scale, second = float(leaves["alpha"]) / down.shape[0], up @ down
    return torch.kron(leaves["lokr_w1"].float(), second.float()) * scale


def _with_hashes(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> Metadata | None:
    return None if metadata is None else {**metadata, **sshs_hashes(state, metadata)}
