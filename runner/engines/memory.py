"""Memory options for a card of a given size: the tiers of ``conf/memory``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from runner.config.groups import conf_folder
from runner.config.schema import MemoryConfig
from runner.engines.base import Gpu

# The tiers, smallest first, and the least memory in GB (1,024 MiB) of a card that holds each.
TIERS = (("12gb", 11.0), ("16gb", 15.0), ("24gb", 22.0), ("48gb", 44.0), ("80gb", 76.0))


def largest_tier(gpu: Gpu | None, no_gpu_reason: str) -> tuple[str, str | None]:
    """The largest tier that a card holds, and a line that says why when it was a guess.

    ``no_gpu_reason`` says why there is no ``gpu``.
    """
    if gpu is None:
        reason = no_gpu_reason.replace("no card", "No card")
        return "24gb", f"{reason}: memory=auto is planned as memory=24gb."
    fitting = [name for name, least in TIERS if gpu.memory_gb >= least]
    if fitting:
        return fitting[-1], None
    return "12gb", (
        f"{gpu.name} has {gpu.memory_gb:.0f} GB, less than the smallest tier: planned as "
        "memory=12gb."
    )


def filled(chosen: MemoryConfig, tier: str) -> MemoryConfig:
    """``chosen`` with what it leaves open taken from a tier, under the tier's name."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "memory" / f"{tier}.yaml"))
    for item in fields(MemoryConfig):
        own = getattr(chosen, item.name)
        if item.name != "name" and own is not None:
            values[item.name] = own
    return MemoryConfig(**{item.name: values[item.name] for item in fields(MemoryConfig)})
