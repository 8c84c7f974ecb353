"""LoRA files converted without a disk, for tests of what the conversions give."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from runner.formats.lora import conversions


def converted(state: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """All tensors of a LoRA in another form, as a file has them."""
    return {
        f"{one.target}.{leaf}": tensor
        for one in conversions(state, form)
        for leaf, tensor in one.make(state.__getitem__).items()
    }
