"""Inputs of the figures of VAE and encoders: the same numbers for musubi-tuner's networks and ours.

`scripts/record-musubi-encoders` gives them to musubi, and this project's to
`tests/engines/diffusers/test_published_names.py`. Numbers come from numpy's RandomState by name, as
in parity_inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from parity_inputs import normal

# The reduced sizes that the recorder gives to musubi's networks.
VAE: dict[str, Any] = {"block_out_channels": (8, 16, 32, 64, 64), "layers_per_block": 1}
BYT5: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
}  # fmt: skip
SIGLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
QWEN_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 3, 3]}

QWEN_LENGTHS = (40, 23)  # real tokens of two captions; the second is padded
QWEN_CROP = 5
BYT5_LENGTH, BYT5_PADDED = 9, 14


def weights(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights for every name of a part's file, of a size that keeps activations moderate."""
    result = {}
    for name, shape in shapes.items():
        values = normal(f"{part}/{name}", *shape)
        embedding = "shared" in name or "embed_tokens" in name or "relative_attention" in name
        if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values *= 0.1
        elif not embedding:
            values /= math.sqrt(math.prod(shape[1:]))
        result[name] = values.astype(np.float32)
    return result


def clip() -> np.ndarray:
    """Five frames of 32x48, [1, 3, F, H, W] within -1..1."""
    return np.tanh(normal("vae/clip", 1, 3, 5, 32, 48))


def latents() -> np.ndarray:
    """What the VAE decodes, [1, 32, 2, 2, 3]."""
    return normal("vae/latents", 1, 32, 2, 2, 3)


def picture() -> np.ndarray:
    """What SigLIP sees, [1, 3, 56, 56]."""
    return np.tanh(normal("siglip/picture", 1, 3, 56, 56))


def captions() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of two captions, [2, L], padded at the end."""
    longest = max(QWEN_LENGTHS)
    ids = np.random.RandomState(3).randint(3, QWEN["vocab_size"], (2, longest))
    mask = np.zeros((2, longest), np.int64)
    for row, length in enumerate(QWEN_LENGTHS):
        mask[row, :length] = 1
        ids[row, length:] = 0
    return ids, mask


def glyphs() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of a quoted text, [1, L], padded at the end."""
    ids = np.random.RandomState(4).randint(3, 259, (1, BYT5_PADDED))
    mask = np.zeros((1, BYT5_PADDED), np.int64)
    mask[0, :BYT5_LENGTH] = 1
    ids[0, BYT5_LENGTH:] = 0
    return ids, mask
