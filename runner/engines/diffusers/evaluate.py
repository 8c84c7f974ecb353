"""Compute a loss that is comparable between runs: ``python -m runner.engines.diffusers.evaluate``.

This is the flow-matching loss of every example of a dataset, without the LoRA and with it, at eight
fixed timesteps t = (i + 0.5) / 8 for i in 0..7. They are not shifted, so runs with different
timestep shifts are comparable. The noise of an example at a timestep is seeded by the example's
latents and i: it is the same for every run on a dataset, whatever its order, batch size or seed.
The loss is the mean over examples and timesteps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from runner.core.atomic import write_text
from runner.core.errors import UserError
from runner.engines.diffusers import cli, data, flow, network_files, options, placement
from runner.engines.diffusers.device import Device
from runner.formats.train_options import TrainOptions

TIMES = tuple((index + 0.5) / 8 for index in range(8))


def example_noise(latents: Tensor) -> Tensor:
    """Draw standard normal noise for one example.

    Returns:
        [8, 32, F, h, w] for latents [32, F, h, w]: one noise per timestep.
    """
    content = latents.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(content).hexdigest()
    noises = []
    for index in range(len(TIMES)):
        generator = torch.Generator().manual_seed(flow.derived_seed(digest, index))
        noises.append(torch.randn(latents.shape, generator=generator))
    return torch.stack(noises)


@torch.no_grad()
def example_losses(
    forward: nn.Module, example: flow.TrainingExample, device: Device, *, scale_condition: bool
) -> list[float]:
    """Compute the loss of one example at each of the eight timesteps, in turn."""
    batch = flow.collate([example]).to(device.name)
    losses = []
    for noise, t in zip(example_noise(example.latents), TIMES, strict=True):
        with device.autocast():
            errors, _ = flow.training_step(
                forward,
                batch,
                noise[None].to(device.name),
                torch.tensor([t], device=device.name),
                scale_condition=scale_condition,
            )
        losses.append(errors.item())
    return losses


def evaluate(
    train_options: TrainOptions,
    dataset_config: str,
    lora: str,
    memory_limit_gb: float | None = None,
) -> dict[str, Any]:
    """Compute the contents of evaluation.json.

    Args:
        train_options: the options of train.toml.
        dataset_config: the dataset.toml to evaluate on.
        lora: the LoRA file.
        memory_limit_gb: GPU memory to use, in GiB; by default all that is free.

    Raises:
        UserError: cache files, weights or the LoRA file are missing or do not fit.
    """
    datasets = data.scan(dataset_config, train_options.task)
    examples = [files for dataset in datasets for files in dataset.examples]
    try:
        weights = load_file(lora)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{lora}: not a LoRA file that can be read ({error})") from None
    device = Device.choose(train_options)
    forward, network = placement.load(
        train_options,
        device,
        lambda model: network_files.from_weights(model, weights, device=device.name).eval(),
        tokens=max(math.prod(files.shape[1:]) for files in examples),
        limit_gb=memory_limit_gb,
        training=False,
    )

    sums: dict[bool, list[float]] = {False: [0.0] * len(TIMES), True: [0.0] * len(TIMES)}
    printed = time.monotonic()
    for number, files in enumerate(examples, 1):
        example = data.load(files)
        for enabled, total in sums.items():
            network.enabled = enabled
            losses = example_losses(
                forward, example, device, scale_condition=not train_options.i2v_unscaled_condition
            )
            for index, loss in enumerate(losses):
                total[index] += loss
        if time.monotonic() - printed >= 1 or number == len(examples):
            printed = time.monotonic()
            print(f"evaluated {number}/{len(examples)} items", flush=True)
    base, tuned = ([value / len(examples) for value in sums[on]] for on in (False, True))
    return {
        "items": len(examples),
        "timesteps": list(TIMES),
        "base_loss": sum(base) / len(base),
        "loss": sum(tuned) / len(tuned),
        "base_loss_by_timestep": base,
        "loss_by_timestep": tuned,
    }


def main(arguments: Sequence[str]) -> None:
    """Evaluate and write evaluation.json atomically.

    Raises:
        UserError: cache files, weights, options or the LoRA file cannot be used.
    """
    parser = argparse.ArgumentParser(prog="evaluate", description="Loss on a dataset.")
    parser.add_argument("--config_file", required=True, help="train.toml of the run")
    parser.add_argument("--dataset_config", required=True, help="dataset.toml to evaluate on")
    parser.add_argument("--lora", required=True, help="LoRA file in musubi's names")
    parser.add_argument("--output", required=True, help="evaluation.json to write")
    cli.add_memory_limit(parser)
    parsed = parser.parse_args(arguments)
    figures = evaluate(
        options.read(parsed.config_file),
        parsed.dataset_config,
        parsed.lora,
        parsed.memory_limit_gb,
    )
    write_text(Path(parsed.output), json.dumps(figures, indent=2) + "\n")
    print(f"base loss {figures['base_loss']:.6f}, with LoRA {figures['loss']:.6f}")


if __name__ == "__main__":
    cli.run(main)
