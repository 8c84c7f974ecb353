"""Memory options for a GPU of a given size: the tiers of ``conf/memory``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from runner.config.groups import conf_folder
from runner.config.schema import MemoryConfig, RunConfig
from runner.engines.base import Gpu

# The tiers, smallest first, and the GPU memory in GB (1,024 MiB) that each needs at least.
TIERS = (("12gb", 11.0), ("16gb", 15.0), ("24gb", 22.0), ("48gb", 44.0), ("80gb", 76.0))
# What a display uses is left out of account.
_DISPLAY_GB = 1.5
# Less than any tier needs for its stages (docs/memory.md).
_LEAST_GB = 7.0


def largest_tier(
    gpu: Gpu | None, no_gpu_reason: str, limit_gb: float | None = None
) -> tuple[str, str | None]:
    """Choose the largest memory tier that fits the GPU.

    Args:
        gpu: the GPU, if there is one.
        no_gpu_reason: why there is no GPU.
        limit_gb: memory of the GPU that may be used; by default all of it.

    Returns:
        The tier, and a notice if it is a guess.
    """
    if limit_gb is not None:
        fitting = [name for name, needed_gb in TIERS if limit_gb >= needed_gb]
        if not fitting:
            return TIERS[0][0], (
                f"memory.limit_gb={limit_gb:g} is less than the smallest tier: planned as "
                f"memory={TIERS[0][0]}."
            )
        return fitting[-1], None
    if gpu is None:
        reason = no_gpu_reason.replace("no GPU", "No GPU")
        return "24gb", f"{reason}: memory=auto is planned as memory=24gb."
    shared = _is_shared(gpu)
    available_gb = gpu.free_gb if shared else gpu.memory_gb
    fitting = [name for name, needed_gb in TIERS if available_gb >= needed_gb]
    tier = fitting[-1] if fitting else TIERS[0][0]
    if shared:
        return tier, f"{_free(gpu)}: memory=auto is planned as memory={tier}."
    if fitting:
        return tier, None
    return "12gb", (
        f"{gpu.name} has {gpu.memory_gb:.0f} GB, less than the smallest tier: planned as "
        "memory=12gb."
    )


def tier_size_gb(name: str) -> float | None:
    """Return the GPU memory in GB that a tier is named after; None for auto and cpu."""
    return float(name.removesuffix("gb")) if name in dict(TIERS) else None


def tier_notice(memory: MemoryConfig, gpu: Gpu | None) -> str | None:
    """Say that other programs use memory which a tier chosen by name needs; None if it fits."""
    needed_gb = dict(TIERS).get(memory.name, 0.0)
    if gpu is None or not _is_shared(gpu) or gpu.free_gb >= needed_gb:
        return None
    return (
        f"{_free(gpu)}, and memory={memory.name} is meant for {needed_gb:.0f} GB: it may run out."
    )


def occupied(config: RunConfig, gpu: Gpu) -> str | None:
    """Return why other programs leave no room on the GPU for a run, or None."""
    if gpu.compute_mode == "Prohibited":
        return (
            f"{gpu.name} is in compute mode Prohibited, so no program can use it: "
            "nvidia-smi --compute-mode=DEFAULT, as root, allows it."
        )
    if gpu.compute_mode == "Exclusive_Process" and gpu.programs:
        return (
            f"{gpu.name} is in exclusive compute mode, and {', '.join(gpu.programs)} uses it: "
            "wait until that ends, or choose another GPU with CUDA_VISIBLE_DEVICES."
        )
    if config.model.source == "hub" and _is_shared(gpu) and gpu.free_gb < _LEAST_GB:
        return (
            f"{_free(gpu)}, too little for any memory tier: wait until other programs end, or "
            "choose another GPU with CUDA_VISIBLE_DEVICES."
        )
    return None


def _is_shared(gpu: Gpu) -> bool:
    return gpu.used_gb > _DISPLAY_GB


def _free(gpu: Gpu) -> str:
    programs = f" ({', '.join(gpu.programs)})" if gpu.programs else ""
    return f"{gpu.name} has {gpu.free_gb:.1f} of {gpu.memory_gb:.1f} GB free{programs}"


def filled(chosen: MemoryConfig, tier: str) -> MemoryConfig:
    """Fill the options that ``chosen`` leaves open from a tier, and take the tier's name."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "memory" / f"{tier}.yaml"))
    for field in fields(MemoryConfig):
        own = getattr(chosen, field.name)
        if field.name != "name" and own is not None:
            values[field.name] = own
    return MemoryConfig(**values)
