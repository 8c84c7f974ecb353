"""Where weights and kept tensors are, for each size of GPU memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from runner.engines.diffusers.memory_plan import Keep, MemoryPlan, Sizes, memory_plan

GIB = 1024**3
# The published transformer, rank 32 in fp32 with AdamW's states, 25 frames of 960x544.
CLIP = Sizes(54, 302 * 10**6, 370 * 10**6, 177 * 10**6 * 16, 14_344 * 2048)


# With less memory the plan goes from keeping everything to streaming every block, in this order.
@pytest.mark.parametrize(
    ("budget_gb", "keep", "offload", "streams"),
    [
        (139, Keep.EVERYTHING, False, False),
        (40, Keep.ATTENTION, False, False),
        (23, Keep.ATTENTION, True, False),
        (12, Keep.ATTENTION, True, True),
        (7, Keep.ATTENTION, True, True),
    ],
)
def test_order(budget_gb: float, keep: Keep, offload: bool, streams: bool) -> None:
    plan = memory_plan(CLIP, round(budget_gb * GIB))
    assert (plan.keep, plan.offload, bool(plan.streamed)) == (keep, offload, streams)
    assert plan.device_bytes <= budget_gb * GIB


# Nothing is streamed needlessly: one block less would not fit. Blocks are spread evenly.
def test_no_more_blocks_than_needed() -> None:
    counts = []
    for budget in range(6 * GIB, 24 * GIB, GIB):
        plan = memory_plan(CLIP, budget)
        if plan.device_bytes <= budget and plan.streamed:
            assert plan.device_bytes + CLIP.block_bytes > budget
            gaps = {after - before for before, after in pairwise(plan.streamed)}
            assert max(gaps) - min(gaps) <= 1
        counts.append(len(plan.streamed))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


# With too little memory the plan is the smallest one, and says that it needs more.
def test_too_little_memory() -> None:
    plan = memory_plan(CLIP, 2 * GIB)
    assert plan == memory_plan(CLIP, 0)
    assert isinstance(plan, MemoryPlan)
    assert len(plan.streamed) == 54 and plan.device_bytes > 2 * GIB


# Main memory holds the streamed weights, and what is kept if it is sent there.
def test_main_memory() -> None:
    assert memory_plan(CLIP, 139 * GIB).host_bytes == 0
    plan = memory_plan(CLIP, 0)
    assert plan.host_bytes == pytest.approx(54 * 302e6 + 54 * 4.1 * CLIP.channels)


# Uncompiled blocks keep attention's results on the GPU, whatever is offloaded: they keep none where
# room is short, and need more while they compute.
def test_uncompiled_blocks() -> None:
    sizes = replace(CLIP, compiled=False)
    assert memory_plan(sizes, 40 * GIB).keep is Keep.ATTENTION
    small = memory_plan(sizes, 12 * GIB)
    assert (small.keep, small.offload) == (Keep.INPUTS, True)
    assert len(small.streamed) > len(memory_plan(CLIP, 12 * GIB).streamed)
