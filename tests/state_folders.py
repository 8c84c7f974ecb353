"""State folders as musubi-tuner saves them: by accelerate, of a LoRA with one module."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import get_constant_schedule

MODULE = "double_blocks.0.img_attn_q"
# The options of a run that trains that module alone.
ONE_MODULE = ("network.exclude=['.*']", f"network.include=['{MODULE}']")


class _Module(torch.nn.Module):
    def __init__(self, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_down = torch.nn.Linear(8, rank, bias=False)
        self.lora_up = torch.nn.Linear(rank, 8, bias=False)
        self.register_buffer("alpha", torch.tensor(alpha))


def network(rank: int, alpha: float) -> torch.nn.Module:
    """Make a network with the names of musubi-tuner's."""
    name = "lora_unet_" + MODULE.replace(".", "_")
    return torch.nn.ModuleDict({name: _Module(rank, alpha)})


def save_state(
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 2.0,
    rate: float = 1e-4,
    steps: int = 500,
    lambda_schedule: bool = True,
) -> None:
    """Save the state of a training at a constant rate, after so many steps."""
    accelerator = Accelerator(cpu=True)
    lora = network(rank, alpha)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=rate)
    schedule = (
        get_constant_schedule(optimizer)
        if lambda_schedule
        else torch.optim.lr_scheduler.StepLR(optimizer, 1)
    )
    accelerator.prepare(lora, optimizer, schedule)
    schedule.last_epoch = steps
    accelerator.save_state(str(folder))
