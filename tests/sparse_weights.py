"""Weight files that are a header and a hole: they have any size, and take no room."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from runner.formats.published_layout import Layout, layout

_BYTES = {"F8_E4M3": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
DTYPES = {
    "transformer": "BF16", "vae": "F16", "text_encoder": "BF16", "byt5": "F16",
    "image_encoder": "F16",
}  # fmt: skip


def write_sparse(file: Path, shapes: Layout, dtype: str, *, dtypes: Mapping[str, str] = {}) -> Path:
    """Write a whole safetensors file whose tensors are all zero.

    Args:
        file: the file.
        shapes: its tensors.
        dtype: their dtype.
        dtypes: those of single tensors.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        own = dtypes.get(name, dtype)
        start, end = end, end + _BYTES[own] * math.prod(shape)
        header[name] = {"dtype": own, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)
    return file


def published(part: str, file: Path, *, whole: bool = False) -> Path:
    """Write a published part at full size; ``whole``: with what only musubi-tuner reads."""
    return write_sparse(file, layout(part, whole=whole), DTYPES[part])


def joined() -> Layout:
    """The transformer as Comfy-Org repackages it: q, k and v of a block's stream in one."""
    shapes = {}
    for name, shape in layout("transformer").items():
        if "_attn_q." in name:
            shapes[name.replace("_q.", "_qkv.")] = (3 * shape[0], *shape[1:])
        elif "_attn_k." not in name and "_attn_v." not in name:
            shapes[name] = shape
    return shapes
