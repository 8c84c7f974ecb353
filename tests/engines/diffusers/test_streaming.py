"""Blocks whose weights and kept tensors wait in main memory give the same results to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)
from test_forward import batch_of, random
from torch import Tensor, nn

from runner.engines.diffusers import networks, offloading
from runner.engines.diffusers.forward import Forward
from runner.engines.diffusers.memory_plan import Keep
from runner.engines.diffusers.models import TINY_TRANSFORMER
from runner.engines.diffusers.streaming import Streaming

BLOCKS = 6


class Step:
    """A network of six blocks and its adapters, whose updates are not zero."""

    def __init__(self, keep: Keep) -> None:
        torch.manual_seed(0)
        model = HunyuanVideo15Transformer3DModel(**{**TINY_TRANSFORMER, "num_layers": BLOCKS})
        self.model: Any = model.requires_grad_(False).eval()
        self.network = networks.create(model, networks.NetworkSpec(rank=2), seed=1).train()
        for number, parameter in enumerate(self.network.parameters()):
            parameter.data += random(*parameter.shape, seed=number) * 0.05
        self.forward = Forward(model, keep=keep)

    def stream(self, streamed: Sequence[int], *, offload: bool) -> Streaming:
        made = Streaming(
            list(self.model.transformer_blocks),
            streamed,
            device="cpu",
            offload=offload,
            staying=self.network.parameters(),
        )
        self.forward.streaming = made
        return made

    def run(self, frames: int = 2) -> dict[str, Tensor]:
        """Run a step, and return its prediction, gradients and a prediction without gradients."""
        self.network.zero_grad()
        inputs = (random(1, 65, frames, 4, 6, seed=3), torch.tensor([300.0]))
        batch = batch_of((5, 3), i2v=False)
        prediction = self.forward(*inputs, batch)
        prediction.square().sum().backward()
        with torch.no_grad():
            preview = self.forward(*inputs, batch)
        found = {
            n: p.grad.clone() for n, p in self.network.named_parameters() if p.grad is not None
        }
        return {"prediction": prediction.detach(), "preview": preview, **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# Whichever blocks are streamed, whatever is kept and wherever it waits: the same to the bit, in
# each step, also when a batch is larger or smaller than the one before.
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("streamed", [(0, 1, 2, 3, 4, 5), (1, 3, 5), (2,), (0, 5)])
@pytest.mark.parametrize("keep", [Keep.ATTENTION, Keep.INPUTS])
def test_the_same_to_the_bit(
    keep: Keep, streamed: Sequence[int], offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "_LEAST_KEPT", 1024)
    plain, step = Step(Keep.EVERYTHING), Step(keep)
    step.stream(streamed, offload=offload)
    for frames in (2, 3, 1, 2):
        assert_same(step.run(frames), plain.run(frames))


# Weights have a few places on the device and no more, and main memory holds each of them once.
def test_memory_of_weights() -> None:
    step = Step(Keep.INPUTS)
    weights = list(step.model.transformer_blocks.parameters())
    before = sum(parameter.numel() * 4 for parameter in weights)
    made = step.stream(range(BLOCKS), offload=False)
    assert before <= made.host_bytes < 1.05 * before
    step.run()
    places = {parameter.untyped_storage().data_ptr() for parameter in weights}
    assert len(made._weights._slots) == 3
    assert {parameter.device.type for parameter in weights} == {"cpu"}
    slots = {slot.buffer.data_ptr() for slot in made._weights._slots}
    assert places <= slots


class KeepingItsWeight(nn.Module):
    """A block that keeps its weight for the backward pass, as compiled ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(32, 32, seed=0), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (_Product.apply(x, self.weight),)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.saved_tensors[0], None


# Weights that lie on the device stay there, though the backward pass needs them: they were sent to
# main memory and back in each step.
def test_resident_weights_are_not_sent_to_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "_LEAST_KEPT", 1024)
    blocks = [KeepingItsWeight() for _ in range(BLOCKS)]
    made = Streaming(blocks, (), device="cpu", offload=True)
    x = random(1, 32, seed=1).requires_grad_()
    for index, block in enumerate(blocks):
        (x,) = made.run(index, block, x, kept=1)
    assert made.host_bytes == 0


# The copy of a block's weights has begun before the block that comes before it computes.
def test_weights_are_copied_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(Keep.INPUTS)
    made = step.stream(range(BLOCKS), offload=False)
    order: list[tuple[str, int]] = []
    fetch, use = made._weights._fetch, made._weights.use

    def fetching(index: int, wanted: Any) -> None:
        order.append(("fetch", index))
        fetch(index, wanted)

    def using(index: int, following: Any) -> None:
        use(index, following)
        order.append(("use", index))

    monkeypatch.setattr(made._weights, "_fetch", fetching)
    monkeypatch.setattr(made._weights, "use", using)
    for _ in range(2):
        order.clear()
        step.run()
    fetched = [index for what, index in order if what == "fetch"]
    # The preview before has begun to copy the first two for whatever follows.
    assert fetched[:4] == [2, 3, 4, 5]
    # The backward pass begins with what the forward pass ended with.
    assert fetched[4:7] == [2, 1, 0]
    for one, other in pairwise(fetched[:4]):
        assert order.index(("fetch", other)) < order.index(("use", one))


# What the forward pass keeps is in main memory alone until the backward pass comes to it: all of
# the blocks but the last two, trained weights and what all blocks share excepted.
def test_kept_tensors_wait_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "_LEAST_KEPT", 1024)
    step = Step(Keep.INPUTS)
    made = step.stream((), offload=True)
    step.forward(random(1, 65, 2, 4, 6, seed=3), torch.tensor([300.0]), batch_of((5, 3), i2v=False))
    waiting = made._kept._waiting
    assert sorted(waiting) == [0, 1, 2, 3]
    # Video and text tokens.
    assert {len(entries) for entries in waiting.values()} == {2}
    assert all(entry.device is None for entries in waiting.values() for entry in entries)
    video, text = 48 * 64 * 4, 8 * 64 * 4
    assert made.host_bytes == 4 * (video + text)


# A gradient that must be absent is not made zero: the last block's text tokens lead nowhere.
def test_absent_gradients_stay_absent() -> None:
    plain, step = Step(Keep.INPUTS), Step(Keep.INPUTS)
    step.stream(range(BLOCKS), offload=False)
    names = set(plain.run()) ^ {"prediction", "preview"}
    assert set(step.run()) ^ {"prediction", "preview"} == names
    assert len(names) < len(list(plain.network.parameters()))
