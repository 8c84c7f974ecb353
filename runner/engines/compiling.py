"""Whether torch.compile can be used for a run: what the engines have in common; pure."""

from __future__ import annotations

from runner.config.schema import RunConfig
from runner.engines.base import Gpu


def reason_against(config: RunConfig, gpu: Gpu, cannot_compile: str | None) -> str | None:
    """Return why torch.compile cannot be used on a GPU, or None.

    Args:
        config: the run's config.
        gpu: the GPU.
        cannot_compile: why it cannot work in the engine's Python, or None.
    """
    if gpu.capability < (7, 0):
        return f"Triton needs compute capability 7.0 ({gpu.name} has less)"
    if config.precision.mixed_precision == "bf16" and gpu.capability < (8, 0):
        return f"below compute capability 8.0 ({gpu.name}) it leaves out bf16"
    if config.precision.fp8_base and gpu.capability < (8, 9):
        return f"below compute capability 8.9 ({gpu.name}) it cannot compile fp8"
    return cannot_compile
