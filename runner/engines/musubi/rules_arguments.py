"""``engine.extra_args``: what the trainer accepts, less what the runner gives it itself; pure."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from typing import Any

from runner.config.schema import RunConfig
from runner.formats.trainer_options import TRAIN, parse

_FOLDERS = "the run's folder, set by the runner"

# Options of the trainer that the runner sets, and which of its own options to use instead.
OWNED = {
    "blocks_to_swap": "memory.blocks_to_swap",
    "block_swap_h2d_only": "memory.h2d_only",
    "byt5": "model.byt5",
    "compile": "training.compile",
    "config_file": _FOLDERS,
    "dataset_config": "dataset.path and the options of dataset",
    "discrete_flow_shift": "training.discrete_flow_shift",
    "dit": "model.transformer",
    "dit_dtype": "precision.dit_dtype",
    "flash_attn": "training.attention",
    "fp8_base": "precision=fp8",
    "fp8_scaled": "precision=fp8",
    "fp8_vl": "memory.fp8_text_encoder",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_checkpointing": "memory.checkpointing",
    "gradient_checkpointing_cpu_offload": "memory.checkpointing=offload",
    "image_encoder": "model.image_encoder",
    "learning_rate": "optimizer.learning_rate",
    "log_with": "tracking",
    "logging_dir": _FOLDERS,
    "lr_scheduler": "scheduler",
    "lr_scheduler_min_lr_ratio": "scheduler.min_lr_ratio",
    "lr_scheduler_num_cycles": "scheduler.num_cycles",
    "lr_scheduler_power": "scheduler.power",
    "lr_warmup_steps": "scheduler.warmup_steps",
    "max_data_loader_n_workers": "training.data_workers",
    "max_grad_norm": "training.max_grad_norm",
    "max_timestep": "training.max_timestep",
    "max_train_epochs": "training.epochs",
    "max_train_steps": "training.max_steps",
    "min_timestep": "training.min_timestep",
    "metadata_author": "metadata.author",
    "metadata_description": "metadata.description",
    "metadata_license": "metadata.license",
    "metadata_tags": "metadata.tags",
    "metadata_title": "metadata.title",
    "mixed_precision": "precision",
    "network_alpha": "network.alpha",
    "network_args": "network.args",
    "network_dim": "network.rank",
    "network_dropout": "network.dropout",
    "network_module": "network",
    "network_weights": "network.weights",
    "optimizer_args": "optimizer.args",
    "optimizer_type": "optimizer",
    "output_dir": _FOLDERS,
    "output_name": _FOLDERS,
    "persistent_data_loader_workers": "training.data_workers",
    "resume": "training.resume_from",
    "resume_from_huggingface": "training.resume_from",
    "sample_at_first": "sampling.at_first",
    "sample_every_n_epochs": "sampling.every_epochs",
    "sample_prompts": "sampling.prompts",
    "save_every_n_epochs": "training.save_every_epochs",
    "save_every_n_steps": "training.save_every_steps",
    "save_last_n_epochs": "training.keep_last",
    "save_last_n_steps": "training.keep_last",
    "save_precision": "training.save_precision",
    "save_state": "training.save_state",
    "sdpa": "training.attention",
    "seed": "training.seed",
    "sigmoid_scale": "training.sigmoid_scale",
    "split_attn": "training.attention=xformers",
    "task": "task",
    "text_encoder": "model.text_encoder",
    "timestep_sampling": "training.timestep_sampling",
    "training_comment": "metadata.comment",
    "use_pinned_memory_for_block_swap": "memory.pinned",
    "vae": "model.vae",
    "vae_sample_size": "memory.vae_tile",
    "weighting_scheme": "training.weighting_scheme",
    "xformers": "training.attention",
}

# Options that end the run or are not meant for training this model.
REFUSED = {
    "dim_from_weights": "it crashes; set network.rank to the file's rank",
    "flash3": "it is ignored beside the runner's own training.attention",
    "lr_decay_steps": "no schedule that the runner offers reads it",
    "lr_scheduler_timescale": "no schedule that the runner offers reads it",
    "sage_attn": "musubi-tuner refuses it in training",
    "show_timesteps": "it ends the trainer before training",
}

# Counts that are divided by, or mean nothing below one.
_AT_LEAST_ONE = (
    *("block_swap_ring_size", "sample_every_n_steps", "compile_cache_size_limit"),
    *("save_last_n_epochs_state", "save_last_n_steps_state", "num_timestep_buckets"),
)
_VAE_DTYPES = ("bfloat16", "float16", "float32", "bf16", "fp16", "fp32")


def extra_arguments(config: RunConfig) -> Iterator[str]:
    """Every problem with ``engine.extra_args``, one line each."""
    values, problems = parse(TRAIN, list(config.engine.extra_args))
    for problem in problems:
        yield f"engine.extra_args: {problem}"
    for name in values:
        if name in OWNED:
            yield f"engine.extra_args: --{name} is set by the runner: use {OWNED[name]} instead."
        elif name in REFUSED:
            yield f"engine.extra_args: --{name} can't be used: {REFUSED[name]}."
    if not problems:
        for problem in _values(values):
            yield f"engine.extra_args: {problem}"


def gives(config: RunConfig, name: str) -> bool:
    """Whether ``engine.extra_args`` have the option, which is named without dashes."""
    return name in parse(TRAIN, list(config.engine.extra_args))[0]


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _values(values: dict[str, Any]) -> Iterator[str]:
    for name in _AT_LEAST_ONE:
        if name in values and values[name] < 1:
            yield f"--{name} {values[name]} is too small: it must be at least 1."
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"--{name} {number} must be finite."
    for pair in values.get("lr_scheduler_args", []):
        if pair.count("=") != 1:
            yield f"--lr_scheduler_args {pair!r} must be KEY=VALUE with one equals sign."
        elif not _is_literal(pair.partition("=")[2]):
            yield (
                f"--lr_scheduler_args {pair!r}: musubi-tuner reads the value as Python, and it "
                "must be a number, a list, True, False, None or a text in quotes."
            )
    if values.get("vae_dtype", "float16") not in _VAE_DTYPES:
        yield f"--vae_dtype can't be {values['vae_dtype']!r}: take float16, bfloat16 or float32."
    size = values.get("metadata_reso")
    if size is not None and not re.fullmatch(r"\d+(,\d+)?", size):
        # It is read when the first checkpoint is saved.
        yield f"--metadata_reso {size!r} must be one number or two with a comma, such as 544,960."
    if "huggingface_repo_id" not in values:
        for name in ("save_state_to_huggingface", "async_upload"):
            if name in values:
                yield f"--{name} needs --huggingface_repo_id."
