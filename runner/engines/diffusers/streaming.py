"""Blocks run one after the other on a GPU that has no room for them all; it knows no model.

Frozen weights of a streamed block lie in main memory, in one buffer. The GPU has a few slots, into
which the buffers of the next blocks are copied while one computes; in the backward pass the order
is reversed. What a block's forward pass keeps for its backward pass can wait in main memory too.

Copies are made in streams of their own, and ordered by events: the host never waits. On the CPU
the same code copies at once, and results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from runner.engines.diffusers.memory_plan import SLOTS
from runner.engines.diffusers.offloading import KeptTensors
from runner.engines.diffusers.transfers import Copies, host_memory, mark, storage_of, wait_for

# Tensors start at multiples of this in a buffer, as PyTorch's own allocations do.
_ALIGNMENT = 512
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
        # The backward pass keeps the weights as well, and those are on the device already.
        resident = [block for i, block in enumerate(blocks) if i not in streamed]
        weights = (weight for block in resident for weight in block.parameters())
        stays = {storage_of(tensor) for tensor in chain(weights, staying)}
        self._kept = KeptTensors(offloaded, device, pinned, stays)

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


def stream_layers(
    layers: Sequence[nn.Module], streamed: Collection[int], *, device: torch.device | str
) -> None:
    """Have a network's layers streamed whenever it computes, without gradients.

    Args:
        layers: the layers, in order.
        streamed: positions of those whose weights are to wait in main memory.
        device: the device that computes.
    """
    device = torch.device(device)
    weights = _Weights({i: layers[i] for i in streamed}, device, device.type == "cuda")

    def use(index: int) -> None:
        weights.use(index, weights.after(index, backward=False))

    for position, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=position: use(index))


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
            for _ in range(min(SLOTS, len(blocks)))
        ]
        self._of_storage = {storage_of(slot.buffer) for slot in self._slots}
        self._copies = Copies(device)
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
            last.free = mark(self._device)
        self._last = index
        distinct = dict.fromkeys(i for i in islice(following, 2 * SLOTS) if i != index)
        coming = list(distinct)[: len(self._slots) - 1]
        wanted = [index, *coming] if index in self._hosts else coming
        for position in wanted:
            if self._slot(position) is None:
                self._fetch(position, wanted)
        if (slot := self._slot(index)) is not None:
            wait_for(slot.arrived)

    def reference(self, index: int, tensor: Tensor) -> _WeightReference | None:
        """Describe a saved tensor by its place in the block's buffer, if it lies in a slot."""
        if storage_of(tensor) not in self._of_storage:
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
        self.buffer = host_memory(size, pinned=pinned)
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
