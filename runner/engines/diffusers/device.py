"""The device that trains, and its precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from runner.core.errors import UserError
from runner.formats.dtypes import torch_dtype
from runner.formats.train_options import TrainOptions


@dataclass(frozen=True)
class Device:
    """The device that trains, and the precision it computes in.

    Attributes:
        name: torch's name of the device.
        weights: dtype of the frozen network.
        compute: dtype of autocast.
    """

    name: str
    weights: torch.dtype
    compute: torch.dtype

    @classmethod
    def choose(cls, train_options: TrainOptions) -> Device:
        """Choose the GPU if there is one; on the CPU always compute in fp32.

        Raises:
            UserError: dit_dtype and mixed_precision do not fit together.
        """
        if not torch.cuda.is_available():
            return cls("cpu", torch.float32, torch.float32)
        compute = weights = torch_dtype(train_options.mixed_precision)
        if train_options.dit_dtype is not None:
            weights = torch_dtype(train_options.dit_dtype)
        if compute == torch.float32 and weights != torch.float32:
            raise UserError(
                f"train.toml: dit_dtype={train_options.dit_dtype!r} needs mixed_precision bf16 or "
                "fp16"
            )
        return cls("cuda", weights, compute)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context for a forward pass; no effect in fp32."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.name, dtype=self.compute)
