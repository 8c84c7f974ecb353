"""The device that trains, and its precision."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.core.errors import UserError
from runner.formats.dtypes import torch_dtype
from runner.formats.train_options import TrainOptions

_GIB = 1024**3
# What stays free, and what CUDA's context and the kernels' code take: measured on an H200.
_MARGIN, _CONTEXT = _GIB // 2, round(0.9 * _GIB)


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

    def reader(self, value: Tensor) -> Callable[[], float]:
        """Return a function that returns a scalar.

        It waits until the GPU has computed the scalar, but for nothing that the GPU was given
        after that.
        """
        if self.name == "cpu":
            return value.item
        copy = torch.empty((), dtype=value.dtype, pin_memory=True)
        copy.copy_(value.detach(), non_blocking=True)
        computed = torch.cuda.current_stream().record_event()

        def read() -> float:
            computed.synchronize()
            return copy.item()

        return read

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context for a forward pass; no effect in fp32."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.name, dtype=self.compute)


def memory_budget(device: str, limit_gb: float | None) -> int | None:
    """Return how many bytes of its memory a process may use, and let it use no more.

    Args:
        device: torch's name of the device.
        limit_gb: what all of the process may use, in GiB; None for all that is free. On the CPU
            it stands for a GPU's memory.

    Returns:
        The bytes for tensors; None on a CPU without a limit.
    """
    limit = None if limit_gb is None else round(limit_gb * _GIB)
    if device == "cpu":
        return limit
    if "microsoft" not in platform.release().lower():
        # Memory that is free in pieces serves for large tensors too; not supported by WSL.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # What earlier work of this process has left behind is free as well.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    budget = free - _MARGIN
    if limit is not None:
        budget = min(budget, limit - _MARGIN - _CONTEXT)
    torch.cuda.set_per_process_memory_fraction(max(budget, 0) / total)
    return budget
