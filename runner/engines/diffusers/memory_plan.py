"""How a training step is spread over GPU and main memory; pure.

What is kept for the backward pass and what a block needs meanwhile grow with the tokens of the
largest batch. The figures for one token were measured at full size
(``docs/development/performance-log.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Keep(Enum):
    """What the forward pass of a block keeps for its backward pass, which computes the rest again.

    Attention is a third of a step's arithmetic and its result is as large as an input, so that
    keeping it costs little and saves much.
    """

    EVERYTHING = "everything"
    ATTENTION = "attention"
    INPUTS = "inputs"


# GPU memory in bytes for a token and a channel of the network's width.
_KEPT_BY_A_BLOCK = {Keep.EVERYTHING: 42.0, Keep.ATTENTION: 4.1, Keep.INPUTS: 2.0}
_WHILE_A_BLOCK_COMPUTES, _UNCOMPILED = 60.0, 120.0
# Workspaces of libraries.
_BESIDES = 400 * 1024**2
# Streamed blocks' places on the GPU: with three, two copies can be under way while one computes.
SLOTS = 3
# Blocks whose kept tensors stay on the GPU or are on their way.
_ON_THE_WAY = 5


@dataclass(frozen=True)
class Sizes:
    """What has to find room.

    Attributes:
        blocks: number of blocks.
        block_bytes: frozen weights of one block.
        other_bytes: frozen weights outside the blocks.
        trained_bytes: weights that are trained, their gradients and the optimizer's states.
        channels: the network's width times the tokens of the largest batch, of video and text.
        compiled: whether the blocks are compiled, which needs less memory.
        training: whether there is a backward pass.
    """

    blocks: int
    block_bytes: int
    other_bytes: int
    trained_bytes: int
    channels: int
    compiled: bool = True
    training: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Where weights and kept tensors are.

    Attributes:
        keep: what a block's forward pass keeps for its backward pass.
        streamed: positions of the blocks whose weights wait in main memory.
        offload: whether what blocks keep waits in main memory.
        device_bytes: GPU memory needed at the peak.
        host_bytes: main memory needed.
    """

    keep: Keep
    streamed: tuple[int, ...]
    offload: bool
    device_bytes: int
    host_bytes: int


def memory_plan(sizes: Sizes, budget: int) -> MemoryPlan:
    """Choose the fastest way that fits.

    To send what is kept to main memory costs one copy to the GPU a step, and to send weights two,
    so what is kept goes first.

    Args:
        sizes: what has to find room.
        budget: GPU memory in bytes.

    Returns:
        The plan. If nothing fits it is the smallest, whose ``device_bytes`` are above ``budget``.
    """
    # Uncompiled, what is kept of attention never leaves the GPU.
    offloaded = Keep.ATTENTION if sizes.compiled else Keep.INPUTS
    plans = (
        _plan(sizes, Keep.EVERYTHING),
        _plan(sizes, Keep.ATTENTION),
        *(
            _plan(sizes, offloaded, streamed=count, offload=sizes.training)
            for count in range(sizes.blocks + 1)
        ),
    )
    return next((plan for plan in plans if plan.device_bytes <= budget), plans[-1])


def _plan(sizes: Sizes, keep: Keep, *, streamed: int = 0, offload: bool = False) -> MemoryPlan:
    on_device = sizes.blocks - streamed + min(SLOTS, streamed)
    kept = sizes.channels * _KEPT_BY_A_BLOCK[keep] if sizes.training else 0
    computing = _WHILE_A_BLOCK_COMPUTES if sizes.compiled else _UNCOMPILED
    held = min(_ON_THE_WAY, sizes.blocks) if offload else sizes.blocks
    return MemoryPlan(
        keep,
        # Evenly spaced, so that a copy has the time of several blocks.
        tuple(sorted({index * sizes.blocks // streamed for index in range(streamed)})),
        offload,
        round(
            sizes.other_bytes
            + sizes.trained_bytes
            + on_device * sizes.block_bytes
            + held * kept
            + sizes.channels * computing
            + _BESIDES
        ),
        round(streamed * sizes.block_bytes + (sizes.blocks * kept if offload else 0)),
    )
