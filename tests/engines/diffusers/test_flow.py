"""Flow matching: times, mixing, padding, and that training learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)

from runner.core.errors import UserError
from runner.engines.diffusers import flow, networks
from runner.engines.diffusers.forward import Forward
from runner.engines.diffusers.models import TINY_TRANSFORMER

# Threads spend far more time waiting for each other than this small network takes.
torch.set_num_threads(1)


def tiny() -> HunyuanVideo15Transformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(**TINY_TRANSFORMER).requires_grad_(False).eval()


def item(
    seed: int, *, text: int = 5, byt5: int = 3, frames: int = 1, i2v: bool = False
) -> flow.TrainingExample:
    stream = torch.Generator().manual_seed(seed)
    latents = torch.randn(32, frames, 4, 6, generator=stream)
    condition = vision = None
    if i2v:
        condition = torch.zeros(33, frames, 4, 6)
        condition[:32, 0], condition[32, 0] = latents[:, 0], 1
        vision = torch.randn(16, 32, generator=stream)
    return flow.TrainingExample(
        latents,
        torch.randn(text, 64, generator=stream),
        torch.randn(byt5, 32, generator=stream),
        condition,
        vision,
    )


# It trains: on a fixed batch with fixed noise, 200 steps at a high rate more than halve the loss.
@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_loss_falls_below_half(i2v: bool) -> None:
    model = tiny()
    network = networks.create(model, networks.NetworkSpec(rank=16, alpha=16), seed=1).train()
    forward = Forward(model)
    batch = flow.collate([item(1, i2v=i2v), item(2, text=7, byt5=0, i2v=i2v)])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.3, 0.8])
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(200):
        errors, _ = flow.training_step(forward, batch, noise, t)
        optimizer.zero_grad()
        errors.mean().backward()
        optimizer.step()
        losses.append(errors.mean().item())
    assert losses[-1] < losses[0] / 2, (losses[0], losses[-1])


# Text padding reaches nothing: an item alone and beside one with a longer caption give the same.
def test_padding_does_not_matter() -> None:
    forward = Forward(tiny())
    items = [item(1, text=4, byt5=0), item(2, text=9, byt5=6)]
    together = flow.collate(items)
    noise = torch.randn(together.latents.shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.2, 0.6])
    errors, prediction = flow.training_step(forward, together, noise, t)
    for index, one in enumerate(items):
        alone = flow.collate([one])
        error, single = flow.training_step(
            forward, alone, noise[index : index + 1], t[index : index + 1]
        )
        assert torch.allclose(single[0], prediction[index], atol=1e-5)
        assert torch.allclose(error[0], errors[index], atol=1e-5)


# The formulas: x = (1-t)*1.03682*latents + t*noise, given the timestep 1000t+1, target noise -
# latents.
def test_step_formula() -> None:
    seen: dict[str, torch.Tensor] = {}

    class Echo(torch.nn.Module):
        def forward(
            self, hidden: torch.Tensor, timestep: torch.Tensor, batch: flow.Batch
        ) -> torch.Tensor:
            seen.update(hidden=hidden, timestep=timestep)
            return torch.zeros_like(hidden[:, :32])

    batch = flow.collate([item(1), item(2)])
    noise = torch.randn(batch.latents.shape)
    t = torch.tensor([0.25, 0.5])
    errors, _ = flow.training_step(Echo(), batch, noise, t)
    scaled = batch.latents * 1.03682
    for index, time in enumerate(t.tolist()):
        mixed = (1 - time) * scaled[index] + time * noise[index]
        assert torch.allclose(seen["hidden"][index, :32], mixed)
        assert torch.allclose(errors[index], ((noise - scaled)[index] ** 2).mean())
    assert not seen["hidden"][:, 32:].any()
    assert seen["timestep"].tolist() == [251.0, 501.0]


# shift: t = sigmoid(scale * z), then s*t / (1 + (s-1)*t); min and max squeeze it into their range.
def test_times() -> None:
    z = torch.tensor([-1.0, 0.0, 2.0])
    t = torch.sigmoid(z * 1.5)
    expected = 2.5 * t / (1 + 1.5 * t)
    sampling = flow.TimeSampling("shift", 2.5, 1.5)
    assert torch.allclose(sampling.from_normal(z), expected)
    squeezed = flow.TimeSampling("shift", 2.5, 1.5, min_timestep=200, max_timestep=600)
    assert torch.allclose(squeezed.from_normal(z), expected * 0.4 + 0.2)
    assert torch.allclose(flow.TimeSampling("sigmoid", 2.5, 1.5).from_normal(z), t)
    drawn = flow.TimeSampling("uniform").draw(1000, torch.Generator().manual_seed(0))
    assert 0 <= drawn.min() < 0.01 < 0.99 < drawn.max() <= 1
    with pytest.raises(UserError, match="timestep_sampling='sigma'"):
        flow.TimeSampling("sigma")


# logsnr: t = sigmoid(-(mean + std * z) / 2), whose middle is sigmoid(-mean / 2).
def test_log_snr_times() -> None:
    sampling = flow.TimeSampling("logsnr", logit_mean=-2.0, logit_std=3.0)
    z = torch.tensor([-1.0, 0.0, 1.0])
    expected = torch.tensor([1 / (1 + math.exp(x / 2)) for x in (-5, -2, 1)])
    assert torch.allclose(sampling.from_normal(z), expected)
    drawn = sampling.draw(4000, torch.Generator().manual_seed(0))
    assert drawn.median().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


# Kept in shape, the timesteps of a range are those that fall into it by themselves; squeezed, all
# are mapped to it. A range that is never met gives any, as musubi-tuner does.
def test_a_range_keeps_the_shape() -> None:
    kept = flow.TimeSampling(
        "shift", 3.0, min_timestep=500, max_timestep=900, preserve_distribution_shape=True
    )
    t = kept.draw(2000, torch.Generator().manual_seed(1))
    free = flow.TimeSampling("shift", 3.0).draw(9000, torch.Generator().manual_seed(2))
    within = free[(free >= 0.5) & (free <= 0.9)]
    assert t.shape == (2000,) and t.min() >= 0.5 and t.max() <= 0.9
    assert t.mean().item() == pytest.approx(within.mean().item(), abs=0.01)
    squeezed = replace(kept, preserve_distribution_shape=False).draw(
        2000, torch.Generator().manual_seed(1)
    )
    assert abs(t.mean() - squeezed.mean()) > 0.01
    never = flow.TimeSampling(
        "sigmoid", sigmoid_scale=0.01, min_timestep=990, preserve_distribution_shape=True
    )
    assert never.draw(3, torch.Generator().manual_seed(1)).tolist() == pytest.approx(
        [0.5] * 3, abs=0.02
    )


# A batch is t2v or i2v as a whole: mixed, the network would take the zeros for a picture.
def test_mixed_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot mix"):
        flow.collate([item(1), item(2, i2v=True)])
