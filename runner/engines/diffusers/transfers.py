"""Copies between GPU and main memory beside the computation, ordered by events.

The host never waits. On the CPU copies are made at once, and there are no events.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Copies:
    """Copies made beside the computation, in order."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor, after: Iterable[Any]) -> None:
        """Copy after these events."""
        if self._stream is None:
            target.copy_(source)
            return
        for event in after:
            if event is not None:
                self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """Return the event that all copies so far are done; None on the CPU."""
        return None if self._stream is None else self._stream.record_event()


def mark(device: torch.device) -> Any:
    """Return the event that all computation so far is done; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_for(event: Any) -> None:
    """Let computation that follows wait for an event."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def storage_of(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """Allocate main memory, [size] uint8, pinned if it is wanted and the system allows it.

    Systems limit pinned memory (WSL to half of all), and copies from other memory are several times
    as slow.
    """
    if pinned and not _REFUSED:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _REFUSED.append(str(error))
            print(
                "note: main memory can't be pinned any further "
                f"({str(error).splitlines()[0]}): copies of the rest are several times as slow. A "
                "higher memory.limit_gb needs less of it.",
                flush=True,
            )
    return torch.empty(size, dtype=torch.uint8)


# Why the system refused to pin memory, once it has.
_REFUSED: list[str] = []
