"""LoRA files: musubi-tuner's names, and the conversions to ComfyUI's and back, and to diffusers'.

Keys are ``lora_unet_double_blocks_<n>_<module>.{lora_down.weight,lora_up.weight,alpha}``, where the
module is one of Tencent's fourteen Linears of a double block, with ``_`` for ``.``. ComfyUI's
network has q, k and v in one Linear and other names for three modules; the conversion, its tripled
alpha and its hashes are those of musubi-tuner v0.3.4's converter for this model. That converter
does not handle LoHa and LoKr: their conversion follows from what ComfyUI's weight adapters compute
(``comfy/weight_adapter/loha.py``, ``lokr.py``): (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank, and
kron(w1, w2). What diffusers takes is what ``load_lora_adapter`` of diffusers 0.42.1 reads
(``loaders/peft.py``, ``utils/peft_utils.py``).

A file is converted module by module, so that memory holds one of them at a time.

Importing this module costs milliseconds; torch and safetensors are loaded by the conversions.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from runner.core.errors import UserError
from runner.formats.safetensors_header import DamagedFileError, read_header, read_scalar
from runner.formats.transformer_keys import BLOCK_LINEARS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Metadata = dict[str, str]
# Returns a tensor of a file by its key.
Reader = Callable[[str], "Tensor"]
# A module's tensors by leaf, the part of the key after the module's name.
Leaves = dict[str, "Tensor"]

# Whether an i2v LoRA was trained with the condition latent unscaled; without it, it was if
# musubi-tuner trained it.
UNSCALED_CONDITION = "ss_i2v_unscaled_condition"

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
# diffusers' name of each module of a double block, by the name in musubi-tuner's files.
_DIFFUSERS = {theirs.replace(".", "_"): ours for theirs, ours in BLOCK_LINEARS.items()}
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
    """Describe a LoRA file with musubi-tuner's names, by its header and one alpha, without torch.

    Raises:
        UserError: it can't be read, or is not such a file (the message names a file of ComfyUI's).
    """
    try:
        return _described(file)
    except DamagedFileError as error:
        why = str(error).removeprefix(f"{file}: ")
        raise UserError(f"{file} can't be read as a LoRA file: {why}") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{file} can't be read as a LoRA file: {why}") from None
    except (IndexError, ValueError):
        raise UserError(f"{file} can't be read as a LoRA file: a tensor's shape is wrong") from None


def _described(file: Path) -> LoraInfo:
    with file.open("rb"):
        header = read_header(file)
    names = {match[2] for key in header if (match := _NAME.fullmatch(key.partition(".")[0]))}
    if any(name in _MUSUBI or name.endswith("_qkv") for name in names):
        raise UserError(
            f"{file} is a LoRA for ComfyUI: take the run's lora.safetensors, or one in its "
            "checkpoints"
        )
    for key, tensor in header.items():
        name, _, leaf = key.partition(".")
        if _NAME.fullmatch(name) and leaf in _RANK_OF:
            kind, side = _RANK_OF[leaf]
            rank = tensor.shape[side]
            alpha = header.get(f"{name}.alpha")
            return LoraInfo(kind, rank, float(rank) if alpha is None else read_scalar(file, alpha))
    for key in header:
        name, _, leaf = key.partition(".")
        if _NAME.fullmatch(name) and leaf == "lokr_w2" and f"{name}.alpha" in header:
            # With a full second factor, musubi-tuner writes the rank as alpha; it does not scale
            # the update.
            scale = read_scalar(file, header[f"{name}.alpha"])
            return LoraInfo("lokr", round(scale), scale)
    raise UserError(f"{file} is not a LoRA of this model")


def read_metadata(file: Path) -> Metadata:
    """Read the metadata of a safetensors file; empty if it has none or can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as handle:
            return handle.metadata() or {}
    except (OSError, SafetensorError):
        return {}


class Conversion(NamedTuple):
    """How one module of a converted file is made.

    Attributes:
        target: the module's name in the converted file.
        make: makes its tensors, by leaf, from the original's; the keys are ``<target>.<leaf>``. It
            reads values of ``alpha`` only, so that the other tensors may be on the device meta.
    """

    target: str
    make: Callable[[Reader], Leaves]


def conversions(keys: Iterable[str], form: str) -> list[Conversion]:
    """Plan the conversion of a file with these keys.

    ``comfyui``: musubi-tuner's file for ComfyUI. q, k and v are joined into ``_qkv``: their downs
    stacked [3r, in], their ups as blocks on the diagonal [3 * out, 3r], and alpha tripled like the
    rank; both pairs of a LoHa likewise. Three Kronecker products cannot be joined into one, so LoKr
    updates are expanded to one full matrix [3 * out, in], with a w1 of 1. One of the three that was
    not trained counts as zero.

    ``musubi``: ComfyUI's file for musubi-tuner, the inverse.

    ``diffusers``: musubi-tuner's file for ``HunyuanVideo15Transformer3DModel.load_lora_adapter``,
    which reads no alpha: ups, or a LoKr's w1, are multiplied by alpha / rank. They become float32
    unless that is a power of two, which rounds nothing.

    Args:
        keys: the keys of the original.
        form: the form of the converted file, ``comfyui``, ``musubi`` or ``diffusers``.

    Raises:
        UserError: not a LoRA of this model, or of a kind that this form does not have.
    """
    plans = {"comfyui": _to_comfyui, "musubi": _from_comfyui, "diffusers": _to_diffusers}
    return list(plans[form](_grouped(keys, form)))


def _to_comfyui(modules: Mapping[str, frozenset[str]]) -> Iterator[Conversion]:
    joined: dict[str, dict[str, frozenset[str]]] = {}
    for name, leaves in modules.items():
        module = _module_of(name)
        if part := _JOINED.fullmatch(module):
            joined.setdefault(name.removesuffix(f"_{part[2]}"), {})[part[2]] = leaves
        else:
            target = name.removesuffix(module) + _COMFYUI.get(module, module)
            yield Conversion(target, partial(_leaves, name, leaves))
    for stem, parts in joined.items():
        yield Conversion(f"{stem}_qkv", partial(_join, stem, parts))


def _from_comfyui(modules: Mapping[str, frozenset[str]]) -> Iterator[Conversion]:
    for name, leaves in modules.items():
        module = _module_of(name)
        if module in ("img_attn_qkv", "txt_attn_qkv"):
            for index, part in enumerate("qkv"):
                target = f"{name.removesuffix('qkv')}{part}"
                yield Conversion(target, partial(_split, name, leaves, index))
        else:
            target = name.removesuffix(module) + _MUSUBI.get(module, module)
            yield Conversion(target, partial(_leaves, name, leaves))


def _to_diffusers(modules: Mapping[str, frozenset[str]]) -> Iterator[Conversion]:
    for name, leaves in modules.items():
        match = _NAME.fullmatch(name)
        module = _DIFFUSERS.get(match[2]) if match else None
        if match is None or module is None:
            raise UserError(f"LoRA file: {name!r} is not a module that musubi-tuner trains")
        yield Conversion(
            f"transformer.transformer_blocks.{match[1]}.{module}",
            partial(_with_scale_inside, name, leaves),
        )


# The adapters that each form has.
_COVERED = {
    "comfyui": ("lora", "loha", "lokr"),
    "musubi": ("lora", "loha"),
    "diffusers": ("lora", "lokr"),
}
_DIRECTIONS = {"comfyui": "to ComfyUI", "musubi": "from ComfyUI", "diffusers": "to diffusers"}


def _grouped(keys: Iterable[str], form: str) -> dict[str, frozenset[str]]:
    """Group keys by module name; refuse incomplete modules and adapters without this form."""
    found: dict[str, list[str]] = {}
    for key in keys:
        name, _, leaf = key.partition(".")
        found.setdefault(name, []).append(leaf)
    result = {name: frozenset(leaves) for name, leaves in found.items()}
    for name, leaves in result.items():
        adapter = _ADAPTER_OF_LEAVES.get(leaves)
        if adapter is None:
            raise UserError(
                f"LoRA file: {name!r} has {sorted(leaves)}, but a module has {sorted(_LEAVES)}, "
                "or all tensors of a LoHa or LoKr"
            )
        if adapter not in _COVERED[form]:
            raise UserError(
                f"LoRA file: {name!r} is of network={adapter}, and conversion {_DIRECTIONS[form]} "
                f"covers {' and '.join(_COVERED[form])}"
            )
    return result


def _module_of(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match[2] if match else ""


def _leaves(name: str, leaves: Iterable[str], read: Reader) -> Leaves:
    return {leaf: read(f"{name}.{leaf}") for leaf in leaves}


def _split(name: str, leaves: frozenset[str], index: int, read: Reader) -> Leaves:
    """Take q, k or v (index 0, 1 or 2) out of a joined module."""
    whole = _leaves(name, leaves, read)
    result = {"alpha": whole["alpha"] / 3}
    for down, up in _PAIRS[_ADAPTER_OF_LEAVES[leaves]]:
        rows = whole[down].chunk(3, dim=0)[index]
        rank = rows.shape[0]
        result[down] = rows.contiguous()
        columns = slice(index * rank, (index + 1) * rank)
        result[up] = whole[up].chunk(3, dim=0)[index][:, columns].contiguous()
    return result


def _join(stem: str, names: Mapping[str, frozenset[str]], read: Reader) -> Leaves:
    """Join q, k and v into one module."""
    import torch

    parts = {part: _leaves(f"{stem}_{part}", leaves, read) for part, leaves in names.items()}
    first = next(iter(parts.values()))
    adapter = _ADAPTER_OF_LEAVES[next(iter(names.values()))]
    if any(_ADAPTER_OF_LEAVES[leaves] != adapter for leaves in names.values()):
        raise UserError(f"LoRA file: q, k and v of {stem!r} are different adapters")
    if adapter == "lokr":
        dtype = first["lokr_w1"].dtype
        whole: Tensor | None = None
        for index, part in enumerate("qkv"):
            if part in parts:
                # One of the three in float32 at a time.
                update = kronecker(parts[part])
                rows, columns = update.shape
                if whole is None:
                    whole = update.new_zeros((3 * rows, columns), dtype=dtype)
                whole[index * rows : (index + 1) * rows] = update
        assert whole is not None
        one = torch.ones((1, 1), dtype=dtype)
        return {"lokr_w1": one, "lokr_w2": whole, "alpha": torch.ones_like(first["alpha"])}
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


def _with_scale_inside(name: str, leaves: frozenset[str], read: Reader) -> Leaves:
    """Rename a module's tensors as PEFT does, and multiply one of them by alpha / rank."""
    parts = _leaves(name, leaves, read)
    alpha = float(parts.pop("alpha"))
    if "lora_up.weight" in parts:
        down, up = (parts[leaf] for leaf in _LEAVES[:2])
        return {"lora_A.weight": down, "lora_B.weight": _times(up, alpha / down.shape[0])}
    if "lokr_w2_b" in parts:
        parts["lokr_w1"] = _times(parts["lokr_w1"], alpha / parts["lokr_w2_b"].shape[0])
    return parts


def _times(tensor: Tensor, scale: float) -> Tensor:
    exact = math.frexp(scale)[0] == 0.5
    return (tensor if exact else tensor.float()) * scale


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
