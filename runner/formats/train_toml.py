"""train.toml: the trainer's options under musubi-tuner's names; pure.

The names, types and defaults are those of ``hv_1_5_train_network.py`` in musubi-tuner v0.3.4,
whose ``--config_file`` reads this file. Keys that stand at the trainer's own default are written
too where that default could change what is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.schema import MemoryConfig, RunConfig

_NETWORK_MODULES = {
    "lora": "networks.lora_hv_1_5",
    "loha": "networks.loha",
    "lokr": "networks.lokr",
}
# Schedules that have a number of cycles, and those that have a least rate.
WITH_CYCLES = ("cosine_with_restarts", "cosine_with_min_lr")
WITH_LEAST_RATE = ("cosine_with_min_lr", "rex")
_ATTENTION_FLAGS = {"sdpa": "sdpa", "flash": "flash_attn", "xformers": "xformers"}


@dataclass(frozen=True)
class WeightPaths:
    """Files, or for the tiny model folders, that the trainer loads."""

    transformer: str
    vae: str
    text_encoder: str
    byt5: str
    image_encoder: str


def train_options(
    config: RunConfig,
    weights: WeightPaths,
    memory: MemoryConfig,
    *,
    name: str,
    seed: int,
    compile_blocks: bool,
    own: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The trainer's options; ``memory`` is the resolved tier, ``seed`` the resolved seed.

    ``name`` is the run's name, which the LoRA file has for a title unless it is given one, and
    ``own`` the options that the engine's trainer knows beyond musubi-tuner's.
    """
    training, network, optimizer = config.training, config.network, config.optimizer
    options: dict[str, Any] = {
        "task": config.task.name,
        "dit": weights.transformer,
        "vae": weights.vae,
        "text_encoder": weights.text_encoder,
        "byt5": weights.byt5,
        "dataset_config": "dataset.toml",
        _ATTENTION_FLAGS[training.attention]: True,
        "mixed_precision": config.precision.mixed_precision,
        "timestep_sampling": training.timestep_sampling,
        "discrete_flow_shift": training.discrete_flow_shift,
        "sigmoid_scale": training.sigmoid_scale,
        "weighting_scheme": training.weighting_scheme,
        "optimizer_type": optimizer.type,
        "learning_rate": optimizer.learning_rate,
        "max_grad_norm": training.max_grad_norm,
        "lr_scheduler": config.scheduler.name,
        "network_module": _NETWORK_MODULES[network.name],
        "network_dim": network.rank,
        "network_alpha": network.alpha,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_data_loader_n_workers": training.data_workers,
        "seed": seed,
        "output_dir": "checkpoints",
        "output_name": "lora",
        "save_precision": training.save_precision,
        "logging_dir": "tensorboard",
        "log_with": "tensorboard",
    }
    if training.max_steps is None:
        options["max_train_epochs"] = training.epochs
    else:
        options["max_train_steps"] = training.max_steps
    optional: dict[str, Any] = {
        "image_encoder": weights.image_encoder if config.task.name == "i2v" else None,
        "dit_dtype": config.precision.dit_dtype,
        "fp8_base": config.precision.fp8_base or None,
        "fp8_scaled": config.precision.fp8_scaled or None,
        "fp8_vl": memory.fp8_text_encoder or None,
        # xformers is refused without it.
        "split_attn": True if training.attention == "xformers" else None,
        "compile": compile_blocks or None,
        # With torch's limit of 8, graphs for the third shape and on were left out of compiling in a
        # run of 12 shapes with block swap (docs/musubi-proof.md); 32 is what musubi-tuner advises.
        "compile_cache_size_limit": 32 if compile_blocks else None,
        "persistent_data_loader_workers": True if training.data_workers else None,
        "min_timestep": training.min_timestep,
        "max_timestep": training.max_timestep,
        **_checkpoints(config),
        "network_weights": network.weights,
        "network_dropout": network.dropout,
        "network_args": _network_args(config) or None,
        "optimizer_args": _pairs(optimizer.args) or None,
        **_scheduler(config),
        **_memory(memory),
        **_previews(config),
        **_metadata(config, name),
    }
    options.update({key: value for key, value in optional.items() if value is not None})
    if "i2v_unscaled_condition" in own and config.task.name == "i2v":
        options["i2v_unscaled_condition"] = training.i2v_unscaled_condition
    return options


def render(options: Mapping[str, Any]) -> str:
    """The options as TOML text."""
    import tomli_w

    return tomli_w.dumps(dict(options))


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value!r}" for key, value in values.items()]


def _network_args(config: RunConfig) -> list[str]:
    network = config.network
    patterns = {"include_patterns": network.include, "exclude_patterns": network.exclude}
    args = [f"{key}={list(value)!r}" for key, value in patterns.items() if value]
    return args + [f"{key}={value}" for key, value in network.args.items()]


def _scheduler(config: RunConfig) -> dict[str, Any]:
    scheduler = config.scheduler
    return {
        "lr_warmup_steps": scheduler.warmup_steps or None,
        "lr_scheduler_num_cycles": (
            # With a least rate they are half waves: an even number of them ends at the full rate.
            scheduler.num_cycles if scheduler.name in WITH_CYCLES else None
        ),
        "lr_scheduler_power": scheduler.power if scheduler.name == "polynomial" else None,
        "lr_scheduler_min_lr_ratio": (
            scheduler.min_lr_ratio if scheduler.name in WITH_LEAST_RATE else None
        ),
    }


def _checkpoints(config: RunConfig) -> dict[str, Any]:
    training = config.training
    epochs, steps, keep = training.save_every_epochs, training.save_every_steps, training.keep_last
    return {
        "save_every_n_epochs": epochs,
        "save_every_n_steps": steps,
        "save_last_n_epochs": keep if epochs else None,
        # Counted in steps: the checkpoint of the step itself, and those of so many before it.
        "save_last_n_steps": (keep - 1) * steps if keep and steps else None,
        "save_state": training.save_state or None,
        "resume": training.resume_from,
    }


def _metadata(config: RunConfig, name: str) -> dict[str, Any]:
    metadata = config.metadata
    return {
        "metadata_title": metadata.title or name,
        "metadata_author": metadata.author,
        "metadata_description": metadata.description,
        "metadata_license": metadata.license,
        "metadata_tags": ",".join(metadata.tags) or None,
        "training_comment": metadata.comment,
    }


def _memory(memory: MemoryConfig) -> dict[str, Any]:
    swapping = bool(memory.blocks_to_swap)
    return {
        "gradient_checkpointing": memory.checkpointing in ("full", "offload") or None,
        "gradient_checkpointing_cpu_offload": memory.checkpointing == "offload" or None,
        "blocks_to_swap": memory.blocks_to_swap or None,
        "use_pinned_memory_for_block_swap": (swapping and memory.pinned) or None,
        "block_swap_h2d_only": (swapping and memory.h2d_only) or None,
        "vae_sample_size": memory.vae_tile,
    }


def _previews(config: RunConfig) -> dict[str, Any]:
    if config.sampling.name == "none":
        return {}
    return {
        "sample_prompts": "sample_prompts.txt",
        "sample_every_n_epochs": config.sampling.every_epochs,
        "sample_at_first": config.sampling.at_first or None,
    }


def sample_prompts(config: RunConfig, image: str | None) -> str:
    """The previews' prompts in musubi-tuner's one-line-a-prompt form."""
    sampling = config.sampling
    tail = (
        f" --w {sampling.width} --h {sampling.height} --f {sampling.frames}"
        f" --d {sampling.seed} --s {sampling.steps} --l {sampling.guidance_scale:g}"
        f" --fs {sampling.flow_shift:g}"
    )
    if sampling.negative_prompt:
        tail += f" --n {sampling.negative_prompt}"
    if image is not None:
        tail += f" --i {image}"
    return "".join(f"{prompt}{tail}\n" for prompt in sampling.prompts)
