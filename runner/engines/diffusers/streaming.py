"""Blocks run one after the other on a GPU that has no room for them all; it knows no model.

Frozen weights of a streamed block lie in main memory, in one buffer. The GPU has a few slots, into
which the buffers of the next blocks are copied while one computes; in the backward pass the order
is reversed. What a block's forward pass keeps for its backward pass can wait in main memory too.

Copies are made in streams of their own, and ordered by events: the host never waits. On the CPU
the same code copies at once, and results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

# With three, two copies can be under way while a block computes.
_SLOTS = 3
# Tensors start at multiples of this in a buffer, as PyTorch's own allocations do.
_ALIGNMENT = 512
# Smaller tensors stay on the GPU.
_LEAST_KEPT = 1 << 20
# The backward pass begins with the last blocks, so what they keep stays on the GPU.
_STAYING = 2


class Streaming:
    """Blocks, of which some are streamed, and their place in the forward and backward pass.

    Args:
        blocks: all blocks, in order. Streamed ones have their frozen parameters on the CPU; what
            is trained belongs to other modules.
        streamed: positions of the streamed blocks.
        device: the device that computes.
        offload: whether what the blocks keep for the backward pass waits in main memory.
        pinned: whether main memory is pinned. Without that the host waits for each copy, which
            is several times as slow.
        staying: tensors on the device that blocks keep but that stay there, as trained weights.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streamed: Collection[int],
        *,
        device: torch.device | str,
        offload: bool = False,
        pinned: bool = True,
        staying: Iterable[Tensor] = (),
    ) -> None:
        device = torch.device(device)
        pinned = pinned and device.type == "cuda"
        self._weights = _Weights({i: blocks[i] for i in streamed}, device, pinned)
        offloaded = range(len(blocks) - _STAYING) if offload else range(0)
        self._kept = _Kept(offloaded, device, pinned, {_storage(tensor) for tensor in staying})

    @property
    def host_bytes(self) -> int:
        """Main memory in use, in bytes."""
        return self._weights.host_bytes + self._kept.host_bytes

    def load(self, index: int) -> None:
        """Have a block's weights on the GPU until three others have been used."""
        self._weights.use(index, ())

    def run(
        self, index: int, block: Callable[..., tuple[Tensor, ...]], *inputs: Any, kept: int
    ) -> tuple[Tensor, ...]:
        """Run a block.

        Args:
            index: its position.
            block: the block, or something that calls it with the same arguments. If it is streamed
                it must compute its forward pass again in the backward pass.
            inputs: its inputs.
            kept: number of inputs, from the first, that may wait in main memory; the others are
                the same for all blocks.

        Returns:
            Its outputs.
        """
        backward = torch.is_grad_enabled()
        self._weights.use(index, self._weights.after(index, backward))
        if not backward:
            return block(*inputs)
        self._kept.begin(index, inputs[kept:])
        with self._saving(index):
            outputs = block(*inputs)
        self._kept.end(index)
        return _Gate.apply(lambda: self._enter_backward(index), *outputs)

    def _saving(self, index: int) -> AbstractContextManager[Any]:
        if not self._weights.streams and not self._kept.active:
            return nullcontext()

        def pack(tensor: Tensor) -> Any:
            return self._weights.reference(index, tensor) or self._kept.put(index, tensor)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            if isinstance(packed, _WeightReference):
                return self._weights.tensor(packed)
            return self._kept.take(packed)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _enter_backward(self, index: int) -> None:
        self._weights.use(index, self._weights.before(index))
        self._kept.enter_backward(index)


class _Gate(torch.autograd.Function):
    """The identity; its backward pass makes a call before that of the block begins."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        # What is not used has no gradient, and not a gradient of zeros.
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call()
        return (None, *gradients)


class _Copies:
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


def _mark(device: torch.device) -> Any:
    """Return the event that all computation so far is done; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _wait(event: Any) -> None:
    """Let computation that follows wait for an event."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


@dataclass
class _Slot:
    """A place on the GPU for the weights of one block.

    Attributes:
        buffer: uint8.
        holder: position of the block whose weights are there or on their way.
        arrived: the event that they are there.
        free: the event that the block's computation so far is done.
    """

    buffer: Tensor
    holder: int | None = None
    arrived: Any = None
    free: Any = None


@dataclass(frozen=True)
class _WeightReference:
    """A saved tensor that is a weight of a streamed block: where it lies in the block's buffer."""

    index: int
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class _Weights:
    """The streamed blocks' weights."""

    def __init__(self, blocks: Mapping[int, nn.Module], device: torch.device, pinned: bool) -> None:
        self._device = device
        self._order = sorted(blocks)
        self._hosts = {index: _HostWeights(blocks[index], pinned) for index in self._order}
        size = max((host.buffer.numel() for host in self._hosts.values()), default=0)
        self._slots = [
            _Slot(torch.empty(size, dtype=torch.uint8, device=device))
            for _ in range(min(_SLOTS, len(blocks)))
        ]
        self._of_storage = {_storage(slot.buffer) for slot in self._slots}
        self._copies = _Copies(device)
        self._last: int | None = None

    @property
    def streams(self) -> bool:
        return bool(self._order)

    @property
    def host_bytes(self) -> int:
        return sum(host.buffer.numel() for host in self._hosts.values())

    def after(self, index: int, backward: bool) -> Iterable[int]:
        """Return which streamed blocks follow in the forward pass and behind its end."""
        return chain(
            (i for i in self._order if i > index),
            reversed(self._order) if backward else self._order,
        )

    def before(self, index: int) -> Iterable[int]:
        """Return which streamed blocks follow in the backward pass and behind its end."""
        return chain((i for i in reversed(self._order) if i < index), self._order)

    def use(self, index: int, following: Iterable[int]) -> None:
        """Let computation wait for a block's weights, and begin to copy those of the next ones."""
        if not self._order:
            return
        if (last := self._slot(self._last)) is not None:
            last.free = _mark(self._device)
        self._last = index
        distinct = dict.fromkeys(i for i in islice(following, 2 * _SLOTS) if i != index)
        coming = list(distinct)[: len(self._slots) - 1]
        wanted = [index, *coming] if index in self._hosts else coming
        for position in wanted:
            if self._slot(position) is None:
                self._fetch(position, wanted)
        if (slot := self._slot(index)) is not None:
            _wait(slot.arrived)

    def reference(self, index: int, tensor: Tensor) -> _WeightReference | None:
        """Describe a saved tensor by its place in the block's buffer, if it lies in a slot."""
        if _storage(tensor) not in self._of_storage:
            return None
        return _WeightReference(
            index, int(tensor.storage_offset()), tensor.dtype, tensor.shape, tensor.stride()
        )

    def tensor(self, reference: _WeightReference) -> Tensor:
        """Return the saved weight, from the slot that its block has now."""
        slot = self._slot(reference.index)
        if slot is None:
            raise RuntimeError(f"block {reference.index} is not on the device")
        whole = slot.buffer.view(reference.dtype)
        return whole.as_strided(reference.shape, reference.stride, reference.offset)

    def _slot(self, index: int | None) -> _Slot | None:
        if index is None:
            return None
        return next((slot for slot in self._slots if slot.holder == index), None)

    def _fetch(self, index: int, wanted: Collection[int]) -> None:
        slot = next(slot for slot in self._slots if slot.holder not in wanted)
        host = self._hosts[index]
        target = slot.buffer[: host.buffer.numel()]
        self._copies.copy(target, host.buffer, [slot.free])
        slot.holder, slot.arrived = index, self._copies.mark()
        host.point_to(target)


class _HostWeights:
    """The frozen parameters of one block, in one buffer in main memory."""

    def __init__(self, block: nn.Module, pinned: bool) -> None:
        self._places: list[tuple[nn.Parameter, int, int]] = []
        size = 0
        for parameter in block.parameters():
            length = parameter.numel() * parameter.element_size()
            self._places.append((parameter, size, length))
            size += -(-length // _ALIGNMENT) * _ALIGNMENT
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for parameter, start, length in self._places:
            raw = parameter.data.contiguous().view(-1).view(torch.uint8)
            self.buffer[start : start + length].copy_(raw)
        # What the parameters held is freed block by block.
        self.point_to(self.buffer)

    def point_to(self, buffer: Tensor) -> None:
        """Make the parameters views of a buffer."""
        for parameter, start, length in self._places:
            raw = buffer[start : start + length]
            parameter.data = raw.view(parameter.dtype).view(parameter.shape)


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


class _Kept:
    """What forward passes keep, on its way to main memory and back.

    A block's place in main memory is made once, and grows if a larger batch comes.
    """

    def __init__(
        self, offloaded: Collection[int], device: torch.device, pinned: bool, staying: set[int]
    ) -> None:
        self._offloaded, self._device, self._pinned = offloaded, device, pinned
        self._staying = staying
        self._out, self._back = _Copies(device), _Copies(device)
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
            self._shared = {_storage(tensor) for tensor in _tensors(shared)}
            self._waiting[index] = []

    def put(self, index: int, tensor: Tensor) -> Tensor | _Waiting:
        """Keep a tensor in main memory, if it is large and not kept elsewhere anyway."""
        size = tensor.numel() * tensor.element_size()
        if (
            index not in self._waiting
            or size < _LEAST_KEPT
            or tensor.device.type != self._device.type
            or not tensor.is_contiguous()
            or _storage(tensor) in self._shared | self._staying
        ):
            return tensor
        place = self._place(index, len(self._waiting[index]), size)
        entry = _Waiting(place.view(tensor.dtype).view(tensor.shape), tensor.detach())
        self._out.copy(entry.host, tensor, [_mark(self._device), self._back.mark()])
        self._waiting[index].append(entry)
        return entry

    def end(self, index: int) -> None:
        """Note the end of a block's forward pass, and free what has gone to main memory."""
        # The copies of one block may be under way: to wait for those before bounds the memory.
        for earlier in list(self._gone):
            _wait(self._gone.pop(earlier))
            for entry in self._waiting[earlier]:
                entry.device = None
        if index in self._waiting:
            self._gone[index] = self._out.mark()

    def enter_backward(self, index: int) -> None:
        """Fetch what a block and the one before it keep; what later blocks kept is done with."""
        for event in self._gone.values():
            _wait(event)
        self._gone.clear()
        for later in [i for i in self._waiting if i > index]:
            del self._waiting[later]
        for position in (index, index - 1):
            for entry in self._waiting.get(position, ()):
                if entry.device is None:
                    self._fetch(entry)

    def take(self, entry: _Waiting) -> Tensor:
        """Return a kept tensor on the device, where nothing else holds it any more."""
        tensor = self._fetch(entry) if entry.device is None else entry.device
        _wait(entry.arrived)
        entry.device = None
        return tensor

    def _fetch(self, entry: _Waiting) -> Tensor:
        # Its memory belongs to the computation's stream, which may have used it for something else
        # just now.
        entry.device = torch.empty_like(entry.host, device=self._device)
        self._back.copy(entry.device, entry.host, [_mark(self._device), self._out.mark()])
        entry.arrived = self._back.mark()
        return entry.device

    def _place(self, index: int, number: int, size: int) -> Tensor:
        """Return main memory of ``size`` bytes for the tensor ``number`` that a block keeps."""
        places = self._places.setdefault(index, [])
        if number == len(places):
            places.append(torch.empty(0, dtype=torch.uint8))
        if places[number].numel() < size:
            places[number] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return places[number][:size]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
