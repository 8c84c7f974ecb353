"""A run's folder for tests of the trainer: tiny weights, caches of random tensors, TOML files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
import torch

from runner.config.latent_frames import latent_frames
from runner.engines.diffusers import make_weights, models
from runner.formats import cache_files, dataset_toml
from runner.formats.frames import Crop, FrameExtraction

SIZE = (96, 64)

# Threads spend far more time waiting for each other than these small networks take.
torch.set_num_threads(1)


def write_run(folder: Path, *, task: str = "t2v", images: int = 3, **options: Any) -> Path:
    """Write weights, caches, dataset.toml and train.toml; returns the folder.

    A t2v run has `images` pictures and two clips of nine frames, an i2v run the clips alone.
    Options go into train.toml; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_weights._make_transformer(folder / "transformer", task=task, seed=7)
    entries = []
    if task == "t2v":
        for index in range(images):
            write_item(folder / "images", f"picture{index}", index)
        entries.append(dataset_toml.DatasetTable("image", "images", SIZE, directory="media"))
    for index in range(2):
        write_item(folder / "clips", f"clip{index}", 10 + index, frames=9, i2v=task == "i2v")
    extraction = FrameExtraction(target_frames=(9,))
    entries.append(
        dataset_toml.DatasetTable(
            "video", "clips", SIZE, directory="media", batch_size=2, extraction=extraction
        )
    )
    (folder / "dataset.toml").write_text(dataset_toml.render(entries), "utf-8")
    values = {
        "dit": "transformer",
        "dataset_config": "dataset.toml",
        "task": task,
        "sdpa": True,
        "mixed_precision": "no",
        "timestep_sampling": "shift",
        "optimizer_type": "adamw",
        "learning_rate": 1e-2,
        "network_module": "networks.lora_hv_1_5",
        "network_dim": 4,
        "network_alpha": 2,
        "max_train_epochs": 2,
        "seed": 42,
        "output_dir": "checkpoints",
        "output_name": "lora",
        **options,
    }
    text = tomli_w.dumps({key: value for key, value in values.items() if value is not None})
    (folder / "train.toml").write_text(text, "utf-8")
    return folder


def write_item(
    folder: Path, name: str, seed: int, *, frames: int = 1, i2v: bool = False, text: bool = True
) -> Path:
    """Write one item's caches, of numbers that depend on the seed; returns the latents' path."""
    stream = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=stream)

    width, height = SIZE[0] // 16, SIZE[1] // 16
    latents = normal(32, latent_frames(frames), height, width)
    condition = siglip = None
    if i2v:
        condition = torch.zeros(33, *latents.shape[1:])
        condition[:32, 0], condition[32, 0] = latents[:, 0], 1
        siglip = normal(16, models.TINY_TRANSFORMER["image_embed_dim"]).half()
    path = folder / cache_files.image_latents_name(name, SIZE)
    if frames > 1:
        path = folder / cache_files.video_latents_name(name, Crop(0, frames), SIZE)
    cache_files.write_latents(
        path,
        latents,
        size=SIZE,
        frame_count=frames if frames > 1 else None,
        latents_image=condition,
        siglip=siglip,
    )
    if text:
        quoted = 5 if seed % 2 else 0
        cache_files.write_text(
            folder / cache_files.text_name(name),
            normal(4 + seed % 5, models.TINY_TRANSFORMER["text_embed_dim"]).bfloat16(),
            normal(quoted, models.TINY_TRANSFORMER["text_embed_2_dim"]),
            caption=name,
        )
    return path


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Run with the folder as the working directory, as the executables do."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
