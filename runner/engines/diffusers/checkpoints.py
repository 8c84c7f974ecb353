"""Write checkpoints: file names, metadata, atomic writes, deletion of old ones.

Names and metadata keys follow musubi-tuner v0.3.4. Dates appear only in the metadata; equal
training gives equal tensors.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from runner.core.atomic import write_bytes
from runner.engines.diffusers.data import Dataset
from runner.engines.diffusers.networks import Network
from runner.formats.dtypes import torch_dtype
from runner.formats.lora import sshs_hashes
from runner.formats.train_options import TABLE, TrainOptions

BASE_MODEL_VERSION = "hunyuan_video_1_5"
ARCHITECTURE = "hunyuan-video-1.5/lora"
IMPLEMENTATION = "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5"


class Checkpoints:
    """The LoRA files of one training run, written into its output folder."""

    def __init__(
        self,
        options: TrainOptions,
        datasets: Sequence[Dataset],
        *,
        optimizer: str,
        seed: int,
        steps: int,
        epochs: int,
        batches: int,
    ) -> None:
        """Prepare the metadata.

        Args:
            options: the options of train.toml.
            datasets: what is trained on.
            optimizer: the optimizer's class and arguments, for the metadata.
            seed: the seed.
            steps: number of optimizer steps.
            epochs: number of epochs.
            batches: number of batches per epoch.
        """
        self._options = options
        self._folder = Path(options.output_dir)
        self._epochs = epochs
        self._dtype = torch_dtype(options.save_precision)
        self._metadata = _metadata(options, datasets, optimizer, seed, steps, epochs, batches)

    def save_epoch(self, network: Network, *, epoch: int, step: int) -> Path | None:
        """Save after an epoch (from 1) if one is due, and delete checkpoints that are too old.

        The last epoch is left to :meth:`save_last`.

        Returns:
            The file written, or None.
        """
        every = self._options.save_every_n_epochs
        if every is None or epoch % every or epoch >= self._epochs:
            return None
        path = self._save(network, self._epoch_path(epoch), epoch=epoch, step=step)
        if self._options.save_last_n_epochs is not None:
            for old in range(every, epoch - every * self._options.save_last_n_epochs + 1, every):
                self._epoch_path(old).unlink(missing_ok=True)
        return path

    def save_step(self, network: Network, *, epoch: int, step: int) -> Path | None:
        """Save after a step (from 1) if one is due, and delete checkpoints that are too old.

        Returns:
            The file written, or None.
        """
        every, kept = self._options.save_every_n_steps, self._options.save_last_n_steps
        if every is None or step % every:
            return None
        path = self._save(network, self._step_path(step), epoch=epoch, step=step)
        if kept is not None:
            for old in range(every, step - kept, every):
                self._step_path(old).unlink(missing_ok=True)
        return path

    def save_last(self, network: Network, *, step: int) -> Path:
        """Save the finished network."""
        path = self._folder / f"{self._options.output_name}.safetensors"
        return self._save(network, path, epoch=self._epochs, step=step)

    def _epoch_path(self, epoch: int) -> Path:
        return self._folder / f"{self._options.output_name}-{epoch:06d}.safetensors"

    def _step_path(self, step: int) -> Path:
        return self._folder / f"{self._options.output_name}-step{step:08d}.safetensors"

    def _save(self, network: Network, path: Path, *, epoch: int, step: int) -> Path:
        state = {
            key: tensor.detach().to("cpu", self._dtype).contiguous()
            for key, tensor in network.state_dict().items()
        }
        now = time.time()
        metadata = {
            **self._metadata,
            "ss_training_finished_at": str(now),
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "modelspec.date": datetime.fromtimestamp(int(now)).isoformat(),
        }
        write_lora(path, state, {**metadata, **sshs_hashes(state, metadata)})
        return path


def write_lora(path: Path | str, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    # Not ``save_file``, whose files only their owner may read.
    write_bytes(Path(path), save(state, metadata))


def _metadata(
    options: TrainOptions,
    datasets: Sequence[Dataset],
    optimizer: str,
    seed: int,
    steps: int,
    epochs: int,
    batches: int,
) -> dict[str, str]:
    values: dict[str, Any] = {
        "ss_session_id": random.SystemRandom().randint(0, 2**32),
        "ss_training_started_at": time.time(),
        "ss_base_model_version": BASE_MODEL_VERSION,
        "ss_num_train_items": sum(len(d.examples) * d.num_repeats for d in datasets),
        "ss_num_batches_per_epoch": batches,
        "ss_num_epochs": epochs,
        "ss_max_train_steps": steps,
        "ss_seed": seed,
        "ss_optimizer": optimizer,
        "ss_sd_model_name": Path(options.dit).name,
        "ss_datasets": json.dumps(
            [
                {
                    "batch_size_per_device": dataset.batch_size,
                    "num_repeats": dataset.num_repeats,
                    "num_items": len(dataset.examples),
                }
                for dataset in datasets
            ]
        ),
    }
    names = [name for name, option in TABLE.items() if option.in_lora]
    values.update({f"ss_{name}": getattr(options, name) for name in names})
    if options.network_args:
        arguments = (argument.partition("=") for argument in options.network_args)
        values["ss_network_args"] = json.dumps({key: value for key, _, value in arguments})
    if options.vae is not None:
        values["ss_vae_name"] = Path(options.vae).name
    if options.task == "i2v":
        values["ss_i2v_unscaled_condition"] = options.i2v_unscaled_condition
    return {key: str(value) for key, value in values.items()} | _model_spec(options)


def _model_spec(options: TrainOptions) -> dict[str, str]:
    """Return Stability AI's model-spec keys (https://github.com/Stability-AI/ModelSpec)."""
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": options.metadata_title or options.output_name,
    }
    for field in dataclasses.fields(options):
        key = field.name.removeprefix("metadata_")
        value = getattr(options, field.name)
        if key not in (field.name, "title", "reso") and value is not None:
            values[f"modelspec.{key}"] = value
    if options.metadata_reso is not None:
        width, _, height = options.metadata_reso.partition(",")
        values["modelspec.resolution"] = f"{width}x{height or width}"
    if options.min_timestep is not None or options.max_timestep is not None:
        low = 0 if options.min_timestep is None else options.min_timestep
        high = 1000 if options.max_timestep is None else options.max_timestep
        values["modelspec.timestep_range"] = f"{low},{high}"
    return values
