"""Names of dtypes in options and files: short (bf16) and long (bfloat16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The long name, which is torch's, of each short one.
LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# That of each dtype in the header of a safetensors file.
SAFETENSORS_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SHORT = tuple(LONG_NAMES)
LONG = tuple(LONG_NAMES.values())
HALF = ("bf16", "fp16")


def torch_dtype(name: str | None) -> torch.dtype:
    """Return the torch dtype of a short or long name; float32 for any other, such as no."""
    import torch

    long = LONG_NAMES.get(name or "", name)
    dtype: torch.dtype = getattr(torch, long) if long in LONG else torch.float32
    return dtype
