"""What forward passes keep for their backward pass, on its way to main memory and back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.engines.diffusers.transfers import Copies, host_memory, mark, storage_of, wait_for

# Smaller tensors stay on the GPU.
_LEAST_KEPT = 1 << 20


@dataclass
class _Waiting:
    """A kept tensor in main memory.

    Attributes:
        host: its copy.
        device: the tensor on the device, until the copy is made, and again from when it is
            fetched.
        arrived: the event that it has been fetched.
    """

    host: Tensor
    device: Tensor | None
    arrived: Any = None


class KeptTensors:
    """What forward passes keep, on its way to main memory and back.

    A block's place in main memory is made once, and grows if a larger batch comes.
    """

    def __init__(
        self, offloaded: Collection[int], device: torch.device, pinned: bool, staying: set[int]
    ) -> None:
        self._offloaded, self._device, self._pinned = offloaded, device, pinned
        self._staying = staying
        self._out, self._back = Copies(device), Copies(device)
        self._places: dict[int, list[Tensor]] = {}
        self._waiting: dict[int, list[_Waiting]] = {}
        self._gone: dict[int, Any] = {}
        self._shared: set[int] = set()

    @property
    def active(self) -> bool:
        return bool(self._offloaded)

    @property
    def host_bytes(self) -> int:
        return sum(place.numel() for places in self._places.values() for place in places)

    def begin(self, index: int, shared: Iterable[Any]) -> None:
        """Prepare for a block's forward pass; ``shared`` are inputs of all blocks."""
        if index in self._offloaded:
            self._shared = {storage_of(tensor) for tensor in _tensors(shared)}
            self._waiting[index] = []

    def put(self, index: int, tensor: Tensor) -> Tensor | _Waiting:
        """Keep a tensor in main memory, if it is large and not kept elsewhere anyway."""
        size = tensor.numel() * tensor.element_size()
        if (
            index not in self._waiting
            or size < _LEAST_KEPT
            or tensor.device.type != self._device.type
            or not tensor.is_contiguous()
            or storage_of(tensor) in self._shared | self._staying
        ):
            return tensor
        place = self._place(index, len(self._waiting[index]), size)
        entry = _Waiting(place.view(tensor.dtype).view(tensor.shape), tensor.detach())
        self._out.copy(entry.host, tensor, [mark(self._device), self._back.mark()])
        self._waiting[index].append(entry)
        return entry

    def end(self, index: int) -> None:
        """Note the end of a block's forward pass, and free what has gone to main memory."""
        # The copies of one block may be under way: to wait for those before bounds the memory.
        for earlier in list(self._gone):
            wait_for(self._gone.pop(earlier))
            for entry in self._waiting[earlier]:
                entry.device = None
        if index in self._waiting:
            self._gone[index] = self._out.mark()

    def enter_backward(self, index: int) -> None:
        """Fetch what a block and the two before it keep; what later blocks kept is done with.

        Two, because a copy may have to wait for that of a whole block's weights.
        """
        for event in self._gone.values():
            wait_for(event)
        self._gone.clear()
        for later in [i for i in self._waiting if i > index]:
            del self._waiting[later]
        for position in (index, index - 1, index - 2):
            for entry in self._waiting.get(position, ()):
                if entry.device is None:
                    self._fetch(entry)

    def take(self, entry: _Waiting) -> Tensor:
        """Return a kept tensor on the device, where nothing else holds it any more."""
        tensor = self._fetch(entry) if entry.device is None else entry.device
        wait_for(entry.arrived)
        entry.device = None
        return tensor

    def _fetch(self, entry: _Waiting) -> Tensor:
        # Its memory belongs to the computation's stream, which may have used it for something else
        # just now.
        entry.device = torch.empty_like(entry.host, device=self._device)
        self._back.copy(entry.device, entry.host, [mark(self._device), self._out.mark()])
        entry.arrived = self._back.mark()
        return entry.device

    def _place(self, index: int, number: int, size: int) -> Tensor:
        """Return main memory of ``size`` bytes for the tensor ``number`` that a block keeps."""
        places = self._places.setdefault(index, [])
        if number == len(places):
            places.append(torch.empty(0, dtype=torch.uint8))
        if places[number].numel() < size:
            places[number] = host_memory(size, pinned=self._pinned)
        return places[number][:size]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
