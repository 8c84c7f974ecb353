"""Rules of the embedded engine on options, checked before anything is read or written; pure."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.schema import RunConfig
from runner.engines.base import Machine

_TIMESTEP_SAMPLINGS = ("shift", "sigmoid", "uniform")


def problems(config: RunConfig) -> Iterator[str]:
    """Every rule that ``config`` breaks, one line each."""
    model, training = config.model, config.training
    if model.source == "hub":
        yield (
            f"engine=diffusers trains model=tiny only, not model={model.name}: take "
            "engine=musubi for the real weights, or model=tiny for a rehearsal."
        )
    if (config.memory.vae_tile or 0) % 64:
        yield f"memory.vae_tile={config.memory.vae_tile} must be 0 or a multiple of 64."
    if config.precision.fp8_base:
        yield "precision=fp8 needs engine=musubi; engine=diffusers takes bf16, fp16 or fp32."
    if config.memory.blocks_to_swap:
        yield "memory.blocks_to_swap needs engine=musubi; with engine=diffusers leave it 0."
    if config.engine.arguments != "file":
        yield "engine.arguments=command_line needs engine=musubi."
    if training.save_state or training.resume_from:
        yield "training.save_state and training.resume_from need engine=musubi."
    if config.engine.extra_args:
        yield "engine.extra_args are arguments of musubi-tuner: they need engine=musubi."
    if training.timestep_sampling not in _TIMESTEP_SAMPLINGS:
        yield (
            f"training.timestep_sampling={training.timestep_sampling} needs "
            "engine=musubi; engine=diffusers takes shift, sigmoid or uniform."
        )
    if training.weighting_scheme != "none":
        yield "training.weighting_scheme needs engine=musubi."


def plan_problems(config: RunConfig, machine: Machine | None) -> Iterator[str]:
    """Rules that need to know the card."""
    if config.optimizer.type.lower().endswith("8bit") and machine is None:
        yield (
            f"optimizer={config.optimizer.name} needs an NVIDIA card, and none was found: take "
            "optimizer=adamw."
        )
