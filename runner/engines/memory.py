"""Memory options for a GPU of a given size: the tiers of ``conf/memory``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from runner.config.groups import conf_folder
from runner.config.schema import MemoryConfig
from runner.engines.base import Gpu

# The tiers, smallest first, and the GPU memory in GB (1,024 MiB) that each needs at least.
TIERS = (("12gb", 11.0), ("16gb", 15.0), ("24gb", 22.0), ("48gb", 44.0), ("80gb", 76.0))


def largest_tier(gpu: Gpu | None, no_gpu_reason: str) -> tuple[str, str | None]:
    """Choose the largest memory tier that fits the GPU.

    Args:
        gpu: the GPU, if there is one.
        no_gpu_reason: why there is no GPU.

    Returns:
        The tier, and a notice if it is a guess.
    """
    if gpu is None:
        reason = no_gpu_reason.replace("no GPU", "No GPU")
        return "24gb", f"{reason}: memory=auto is planned as memory=24gb."
    fitting = [name for name, needed_gb in TIERS if gpu.memory_gb >= needed_gb]
    if fitting:
        return fitting[-1], None
    return "12gb", (
        f"{gpu.name} has {gpu.memory_gb:.0f} GB, less than the smallest tier: planned as "
        "memory=12gb."
    )


def filled(chosen: MemoryConfig, tier: str) -> MemoryConfig:
    """Fill the options that ``chosen`` leaves open from a tier, and take the tier's name."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "memory" / f"{tier}.yaml"))
    for field in fields(MemoryConfig):
        own = getattr(chosen, field.name)
        if field.name != "name" and own is not None:
            values[field.name] = own
    return MemoryConfig(**{field.name: values[field.name] for field in fields(MemoryConfig)})
