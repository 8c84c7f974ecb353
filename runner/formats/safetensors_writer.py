"""Write a safetensors file tensor by tensor: memory holds the largest of them, not the file.

The bytes are those that the library writes (safetensors 0.8, ``serialize``): tensors in the order
of their dtypes, the widest first, then of their names; a header padded to eight bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.core.atomic import whole
from runner.formats.dtypes import SAFETENSORS_NAMES

if TYPE_CHECKING:
    from torch import Tensor

# The dtypes of LoRA files and their bytes, in the library's order.
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_NAMES = {long: name for name, long in SAFETENSORS_NAMES.items()}
# The part of a file that sshs_legacy_hash is of.
_LEGACY_START, _LEGACY_END = 0x100000, 0x110000


class Layout(NamedTuple):
    """dtype (such as BF16) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]


def layout_of(tensor: Tensor) -> Layout:
    """Return dtype and shape of a tensor, which may be on the device meta."""
    return Layout(_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


def write_with_hashes(
    path: Path,
    layouts: Mapping[str, Layout],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a LoRA file atomically, and into its metadata the hashes that identify it.

    They are those of :func:`runner.formats.lora.sshs_hashes`.

    Args:
        path: the file.
        layouts: dtype and shape of each tensor, by name.
        tensor: returns a tensor by its name; called once for each, in the order of the file.
        metadata: the metadata; hashes in it are replaced.

    Raises:
        OSError: the file cannot be written.
    """
    order = sorted(layouts, key=lambda name: (list(_BYTES).index(layouts[name].dtype), name))
    ordered = {name: layouts[name] for name in order}
    # The hashes' lengths are fixed, and so is the header's, which is written again at the end.
    unknown = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    model, legacy = hashlib.sha256(), hashlib.sha256()
    at = 0

    def hash_legacy(data: bytes | memoryview) -> None:
        nonlocal at
        legacy.update(data[max(0, _LEGACY_START - at) : max(0, _LEGACY_END - at)])
        at += len(data)

    hash_legacy(_header(ordered, kept))
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(_header(ordered, {**metadata, **unknown}))
        for name in order:
            data = _bytes_of(tensor(name))
            file.write(data)
            model.update(data)
            hash_legacy(data)
        hashes = {
            "sshs_model_hash": model.hexdigest(),
            "sshs_legacy_hash": legacy.hexdigest()[:8],
        }
        file.seek(0)
        file.write(_header(ordered, {**metadata, **hashes}))


def _header(layouts: Mapping[str, Layout], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the header; ``layouts`` are in the order of the file."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layouts.items():
        start, size = end, _BYTES[dtype]
        for side in shape:
            size *= side
        end += size
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)
