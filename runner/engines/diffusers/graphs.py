"""Training steps of small batches as CUDA graphs.

A step on one picture is twenty thousand small kernels, which a GPU computes faster than a host can
launch them. A graph of them is launched at once. It is captured for inputs of the same shapes and
text lengths when they come for the second time: the first time something may have to be compiled.

Graphs read inputs and weights, and add to gradients, where these lie in memory, so that nothing of
them may be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.engines.diffusers.forward import BlockInputs

# Larger batches keep a GPU busy by themselves, and the graph's memory is its own.
_MOST_TOKENS = 6000
# GPU memory in bytes that must be free for another graph.
_LEAST_FREE = 2 * 1024**3

# Computes the loss of inputs and velocity, and returns it with its backward pass.
Step = Callable[[BlockInputs, Tensor], tuple[Tensor, Callable[[], Any]]]


@dataclass(frozen=True)
class _Graph:
    """A captured step."""

    inputs: BlockInputs
    velocity: Tensor
    loss: Tensor
    forward: Any
    backward: Any


class GraphedSteps:
    """Steps, of which small ones are replayed.

    Args:
        step: computes a step, the same for the same arguments.
        parameters: what is trained. From now on each has a gradient, which is to be made zero but
            not replaced.
    """

    def __init__(self, step: Step, parameters: Iterable[nn.Parameter]) -> None:
        self._step = step
        self._graphs: dict[Any, _Graph | None] = {}
        self._pool: Any = None
        self._full = False
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, inputs: BlockInputs, velocity: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """Compute the loss, and return it with its backward pass."""
        items, tokens, _ = inputs.video.shape
        key = (inputs.video.shape, inputs.text.shape, *inputs.lengths.tolist())
        if items * tokens > _MOST_TOKENS or key not in self._graphs:
            self._graphs[key] = None
            return self._step(inputs, velocity)
        graph = self._graphs[key]
        if graph is None:
            if self._full:
                return self._step(inputs, velocity)
            graph = self._graphs[key] = self._capture(inputs.clone(), velocity.clone())
            self._full = torch.cuda.mem_get_info()[0] < _LEAST_FREE
        else:
            for mine, given in zip(graph.inputs.tensors(), inputs.tensors(), strict=True):
                mine.copy_(given)
            graph.velocity.copy_(velocity)
        graph.forward.replay()
        return graph.loss, graph.backward.replay

    def _capture(self, inputs: BlockInputs, velocity: Tensor) -> _Graph:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Graphs take their memory from one pool, since never two of them are at work.
        with torch.cuda.graph(forward, pool=self._pool):
            loss, run_backward = self._step(inputs, velocity)
        self._pool = forward.pool()
        with torch.cuda.graph(backward, pool=self._pool):
            run_backward()
        return _Graph(inputs, velocity, loss.detach(), forward, backward)
