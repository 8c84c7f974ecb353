"""Names of number types, as options and files say them: short (bf16) and long (bfloat16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Each short name's long one, which is also torch's.
LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SHORT = tuple(LONG_NAMES)
LONG = tuple(LONG_NAMES.values())
HALF = ("bf16", "fp16")


def torch_dtype(name: str | None) -> torch.dtype:
    """The type of either name; float32 for every other word, such as no (mixed precision)."""
    import torch

    long = LONG_NAMES.get(name or "", name)
    found: torch.dtype = getattr(torch, long) if long in LONG else torch.float32
    return found
