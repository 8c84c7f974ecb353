"""The flow-matching training step of HunyuanVideo 1.5, as pure functions of their arguments.

A clean latent x0 and normal noise n are mixed at a timestep t in 0..1, x = (1 - t) * x0 + t * n,
and the network learns the velocity n - x0. Timesteps, mixing, scaling and target are those of
musubi-tuner v0.3.4 (``tests/engines/diffusers/test_parity.py`` compares with its figures).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.errors import UserError
from runner.formats.train_options import TrainOptions

# The VAE's ``scaling_factor``; cache files hold unscaled latents.
VAE_SCALING_FACTOR = 1.03682
LATENT_CHANNELS = 32
TIMESTEP_SAMPLINGS = ("shift", "sigmoid", "uniform", "logsnr")
# How often musubi-tuner draws until enough timesteps are in their range.
_DRAWS = 1000


@dataclass(frozen=True)
class TrainingExample:
    """The network's inputs for one training example; shapes without a batch dimension.

    Attributes:
        latents: [32, F, h, w], unscaled.
        text: Qwen2.5-VL embeddings [L, D].
        byt5: ByT5 embeddings [L2, D2]; L2 is 0 when the caption quotes no text.
        condition: i2v only, [33, F, h, w]: the first frame's unscaled latent, zeros after, and as
            last channel the mask (1 on the first frame).
        vision: i2v only, SigLIP embeddings [N, D3].
    """

    latents: Tensor
    text: Tensor
    byt5: Tensor
    condition: Tensor | None = None
    vision: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Stacked examples of one latent shape; text is padded, and its real lengths are numbers."""

    latents: Tensor
    text: Tensor
    text_lengths: tuple[int, ...]
    byt5: Tensor
    byt5_lengths: tuple[int, ...]
    condition: Tensor | None = None
    vision: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device, without waiting for it."""
        moved: dict[str, Any] = {
            name: to_device(value, device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device without waiting for the device, which pinned memory allows."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(examples: Sequence[TrainingExample]) -> Batch:
    """Stack examples of equal latent shape into a batch of fp32 tensors.

    A batch is t2v or i2v as a whole: the network decides for the whole batch whether image
    embeddings are used.

    Raises:
        ValueError: some examples have a first-frame condition and some do not.
    """
    text, text_lengths = _pad([example.text for example in examples])
    byt5, byt5_lengths = _pad([example.byt5 for example in examples])
    conditions = [example.condition for example in examples if example.condition is not None]
    visions = [example.vision for example in examples if example.vision is not None]
    if any(len(part) not in (0, len(examples)) for part in (conditions, visions)):
        raise ValueError("a batch cannot mix items with and without a first-frame condition")
    return Batch(
        latents=torch.stack([example.latents.float() for example in examples]),
        text=text,
        text_lengths=text_lengths,
        byt5=byt5,
        byt5_lengths=byt5_lengths,
        condition=torch.stack([part.float() for part in conditions]) if conditions else None,
        vision=torch.stack([part.float() for part in visions]) if visions else None,
    )


def _pad(sequences: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    padded = nn.utils.rnn.pad_sequence([s.float() for s in sequences], batch_first=True)
    return padded, tuple(len(sequence) for sequence in sequences)


def derived_seed(*purpose: object) -> int:
    """Derive a 63-bit seed for one purpose, so that random streams do not affect each other."""
    text = "/".join(str(part) for part in purpose)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Shift timesteps in 0..1 towards noise: s*t / (1 + (s-1)*t), as in SD3."""
    return (t * shift) / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class TimeSampling:
    """The distribution of training timesteps; the fields are musubi-tuner's options.

    Attributes:
        timestep_sampling: ``shift``, ``sigmoid``, ``uniform`` or ``logsnr``.
        discrete_flow_shift: the timestep shift of ``shift``.
        sigmoid_scale: scale of the normal value before the logistic function.
        min_timestep: lower end (0..1000) of the range that the drawn timestep is mapped to.
        max_timestep: upper end of that range.
        logit_mean: mean of the log signal-to-noise ratio of ``logsnr``.
        logit_std: its standard deviation.
        preserve_distribution_shape: draw again what is outside the range, instead of mapping to it.
    """

    timestep_sampling: str = "shift"
    discrete_flow_shift: float = 1.0
    sigmoid_scale: float = 1.0
    min_timestep: int | None = None
    max_timestep: int | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    preserve_distribution_shape: bool = False

    def __post_init__(self) -> None:
        if self.timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise UserError(
                f"train.toml: timestep_sampling={self.timestep_sampling!r} is not supported by "
                f"engine=diffusers; use one of {', '.join(TIMESTEP_SAMPLINGS)}"
            )

    @classmethod
    def of(cls, options: TrainOptions) -> TimeSampling:
        """Take the fields from the options of train.toml."""
        return cls(**{option.name: getattr(options, option.name) for option in fields(cls)})

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` timesteps in 0..1, [count]."""
        low, high = self._range
        if not self.preserve_distribution_shape:
            return self._draw(count, generator) * (high - low) + low
        within = torch.empty(0)
        for _ in range(_DRAWS):
            t = self._draw(count, generator)
            within = torch.cat([within, t[(t >= low) & (t <= high)]])
            if len(within) >= count:
                return within[:count]
        # As musubi-tuner does, which warns of it.
        return self._draw(count, generator)

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        if self.timestep_sampling == "uniform":
            return torch.rand(count, generator=generator)
        return self._logistic(torch.randn(count, generator=generator))

    def from_normal(self, z: Tensor) -> Tensor:
        """Turn standard normal values into timesteps of the range.

        They go through the logistic function and the shift; for ``logsnr`` they are log
        signal-to-noise ratios (arXiv 2411.14793), and t is sigmoid(-logsnr / 2).
        """
        low, high = self._range
        return self._logistic(z) * (high - low) + low

    def _logistic(self, z: Tensor) -> Tensor:
        if self.timestep_sampling == "logsnr":
            return torch.sigmoid(-(self.logit_mean + self.logit_std * z) / 2)
        t = torch.sigmoid(z * self.sigmoid_scale)
        return shift_time(t, self.discrete_flow_shift) if self.timestep_sampling == "shift" else t

    @property
    def _range(self) -> tuple[float, float]:
        low = (0.0 if self.min_timestep is None else self.min_timestep) / 1000
        high = (1000.0 if self.max_timestep is None else self.max_timestep) / 1000
        return low, high


def model_input(noisy: Tensor, batch: Batch, *, scale_condition: bool) -> Tensor:
    """Build the network's input.

    Args:
        noisy: [B, 32, F, h, w].
        batch: provides the condition; without one (t2v) it is zeros with a zero mask.
        scale_condition: multiply the condition latent by the VAE's factor, as the published
            pipelines do; musubi-tuner trains with it unscaled.

    Returns:
        [B, 65, F, h, w]: noisy latent 32, condition 32, mask 1.
    """
    if batch.condition is None:
        empty = noisy.new_zeros((noisy.shape[0], LATENT_CHANNELS + 1, *noisy.shape[2:]))
        return torch.cat([noisy, empty], dim=1)
    latent, mask = batch.condition[:, :-1], batch.condition[:, -1:]
    if scale_condition:
        latent = latent * VAE_SCALING_FACTOR
    return torch.cat([noisy, latent, mask], dim=1)


def noisy_input(
    batch: Batch, noise: Tensor, t: Tensor, *, scale_condition: bool
) -> tuple[Tensor, Tensor]:
    """Mix latents with noise.

    Args:
        batch: latents unscaled.
        noise: [B, 32, F, h, w], standard normal.
        t: [B], timesteps in 0..1; 1 is pure noise.
        scale_condition: see :func:`model_input`.

    Returns:
        The network's input [B, 65, F, h, w] and the velocity that it is to predict,
        [B, 32, F, h, w].
    """
    latents = batch.latents * VAE_SCALING_FACTOR
    mix = t.view(-1, 1, 1, 1, 1)
    noisy = (1 - mix) * latents + mix * noise
    return model_input(noisy, batch, scale_condition=scale_condition), noise - latents


def network_time(t: Tensor) -> Tensor:
    """Return what the network is given for timesteps in 0..1."""
    return t * 1000.0 + 1


def squared_errors(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Return the mean squared error of each example, [B], whose mean is the loss."""
    errors = nn.functional.mse_loss(prediction.float(), velocity, reduction="none")
    return errors.mean(dim=(1, 2, 3, 4))


def training_step(
    forward: nn.Module, batch: Batch, noise: Tensor, t: Tensor, *, scale_condition: bool = True
) -> tuple[Tensor, Tensor]:
    """Run one forward pass of flow matching.

    Args:
        forward: the network, as :class:`runner.engines.diffusers.forward.Forward`.
        batch: latents unscaled.
        noise: [B, 32, F, h, w], standard normal.
        t: [B], timesteps in 0..1.
        scale_condition: see :func:`model_input`.

    Returns:
        The squared error of each example, [B], and the prediction [B, 32, F, h, w].
    """
    hidden, velocity = noisy_input(batch, noise, t, scale_condition=scale_condition)
    prediction = forward(hidden, network_time(t), batch)
    return squared_errors(prediction, velocity), prediction
