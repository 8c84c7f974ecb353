"""Rules of musubi-tuner v0.3.4 on options, checked before anything is read or written; pure.

Each is a condition under which it would end with an error, often hours into a run, or take an
option for something else without a word. docs/development/musubi-rules.md lists where each comes
from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.text import did_you_mean
from runner.engines.musubi import rules_optimizer
from runner.engines.musubi.rules_arguments import extra_arguments, gives
from runner.formats.dtypes import LONG
from runner.formats.transformer_keys import BLOCK_LINEARS

_NETWORK_ARGS = {
    "lora": ("rank_dropout", "module_dropout", "loraplus_lr_ratio", "verbose"),
    "loha": ("rank_dropout", "module_dropout", "verbose"),
    "lokr": ("rank_dropout", "module_dropout", "verbose", "factor"),
}


def problems(config: RunConfig) -> Iterator[str]:
    """Every rule that ``config`` breaks, one line each."""
    for rule in (
        _model,
        rules_optimizer.optimizer,
        rules_optimizer.optimizer_args,
        rules_optimizer.schedule,
        _precision,
        _memory,
        _network,
        _network_args,
        _timesteps,
        _previews,
        extra_arguments,
    ):
        yield from rule(config)
    if config.memory.name != "auto":
        yield from _block_swap(config, config.memory)


def _model(config: RunConfig) -> Iterator[str]:
    if config.model.source == "random":
        yield (
            "model=tiny has random weights and is for the embedded engine: add engine=diffusers, "
            "or take model=hunyuan15_720p."
        )


def plan_problems(
    config: RunConfig, memory: MemoryConfig, *, steps: int, clips: bool
) -> Iterator[str]:
    """Rules that need to know the card or the data.

    ``memory`` is the resolved tier, ``steps`` the number of optimizer steps, and ``clips`` says
    whether there are any.
    """
    yield from _block_swap(config, memory)
    warmup = config.scheduler.warmup_steps
    if config.scheduler.name == "rex" and warmup > steps:
        yield f"scheduler.warmup_steps={warmup} must not exceed the run's {steps} steps (rex)."
    for key, source in _datasets(config):
        dataset = config.dataset
        size = _own(source, dataset, "batch_size")
        if not clips or size < 2:
            continue
        # Clips are cached in buckets whatever these say, and then batched by them.
        if not _own(source, dataset, "enable_bucket"):
            flag, right = "enable_bucket", "true"
        elif _own(source, dataset, "bucket_no_upscale"):
            flag, right = "bucket_no_upscale", "false"
        else:
            continue
        yield (
            f"{key}.batch_size={size} with clips would mix sizes in a batch: take "
            f"{key}.{flag}={right}, or {key}.batch_size=1."
        )


def plan_notices(config: RunConfig, *, steps: int) -> Iterator[str]:
    """What goes through but is hardly what was meant, once the number of steps is known."""
    warmup = config.scheduler.warmup_steps
    if warmup >= steps:
        yield (
            f"scheduler.warmup_steps={warmup} is not below the run's {steps} steps: the learning "
            "rate is never reached."
        )
    if config.training.resume_from:
        yield (
            "training.resume_from gives the trainer weights, optimizer and schedule; musubi-tuner "
            f"counts from 0 again and trains {steps} steps more."
        )
    if rules_optimizer.ignores_learning_rate(config):
        yield (
            f"optimizer.learning_rate={config.optimizer.learning_rate:g} does nothing: Adafactor "
            "sets its own rate, unless optimizer.args.relative_step=false and "
            "optimizer.args.warmup_init=false."
        )
    if config.network.dropout and config.network.name != "lora":
        yield (
            f"network.dropout does nothing with network={config.network.name}; "
            "network.args.rank_dropout and network.args.module_dropout do."
        )


def _datasets(config: RunConfig) -> Iterator[tuple[str, Any]]:
    if not config.dataset.sources:
        yield "dataset", config.dataset
    for number, source in enumerate(config.dataset.sources):
        yield f"dataset.sources[{number}]", source


def _own(source: Any, dataset: Any, key: str) -> Any:
    own = getattr(source, key)
    return getattr(dataset, key) if own is None else own


def _precision(config: RunConfig) -> Iterator[str]:
    precision, file = config.precision, config.model.transformer
    mixed, dtype = precision.mixed_precision, precision.dit_dtype
    if dtype is not None and dtype not in LONG:
        yield f"precision.dit_dtype={dtype} is not a choice.{did_you_mean(dtype, LONG)}"
    if precision.fp8_base and mixed == "no":
        yield "precision.fp8_base=true needs precision.mixed_precision=bf16 or fp16."
    elif mixed == "no" and dtype != "float32":
        # Without autocast its float32 inputs meet the network's own type.
        yield "precision.mixed_precision=no needs precision.dit_dtype=float32: take precision=fp32."
    if config.training.attention == "flash" and mixed == "no":
        yield (
            "training.attention=flash needs half precision: take precision=bf16, or "
            "training.attention=sdpa."
        )
    if "fp16" in file.lower() and (dtype in ("bfloat16", "float32") or mixed != "fp16"):
        yield (
            f"model.transformer={file} holds fp16 weights, which can't be trained in "
            f"precision={precision.name}: take precision=fp16, or the bf16 file."
        )


def _memory(config: RunConfig) -> Iterator[str]:
    tile = config.memory.vae_tile
    if tile and tile % 64:
        # Tiles overlap by a quarter, and a latent is 16 pixels wide.
        near = max(64, round(tile / 64) * 64)
        yield (
            f"memory.vae_tile={tile} must be a multiple of 64 (nearest: {near}), or 0 for whole "
            "frames."
        )
    if config.training.seed > 2**32 - 1:
        yield f"training.seed={config.training.seed} must be below 4294967296."


def _block_swap(config: RunConfig, memory: MemoryConfig) -> Iterator[str]:
    """``memory`` has what the tier fills in: before, an option may still be anything."""
    one_way = bool(memory.blocks_to_swap and memory.h2d_only)
    if one_way and memory.checkpointing not in ("full", "offload"):
        yield (
            f"memory.checkpointing={memory.checkpointing} can't be with memory.h2d_only=true, as "
            f"blocks are swapped in memory={memory.name}: take memory.checkpointing=full, or "
            "memory.h2d_only=false."
        )
    if not one_way and gives(config, "block_swap_ring_size"):
        yield (
            "engine.extra_args: --block_swap_ring_size does nothing in "
            f"memory={memory.name} without memory.blocks_to_swap above 0 and memory.h2d_only=true."
        )


def _network(config: RunConfig) -> Iterator[str]:
    network = config.network
    patterns: dict[str, list[re.Pattern[str]]] = {"include": [], "exclude": []}
    for key, compiled in patterns.items():
        for pattern in getattr(network, key):
            try:
                compiled.append(re.compile(pattern))
            except re.error:
                return  # Told by the rules that hold for every engine.
            if "=" in pattern:
                yield (
                    f"network.{key}: {pattern!r} holds an equals sign, where musubi-tuner would "
                    "cut it: names have none, so word it without (?= and (?<=."
                )
    if network.include and not network.exclude:
        yield (
            "network.include does nothing alone, it adds back what network.exclude leaves out: "
            "add 'network.exclude=[\".*\"]' to train just those."
        )
    names = [f"double_blocks.{n}.{m}" for n in range(config.model.blocks) for m in BLOCK_LINEARS]
    if not any(
        any(p.fullmatch(name) for p in patterns["include"])
        or not any(p.fullmatch(name) for p in patterns["exclude"])
        for name in names
    ):
        yield (
            "network.exclude leaves nothing to train: patterns match whole names such as "
            f"{names[0]}; add some back with network.include."
        )


def _network_args(config: RunConfig) -> Iterator[str]:
    network = config.network
    known = _NETWORK_ARGS.get(network.name, ())
    for key, value in network.args.items():
        if "=" in str(value):
            yield (
                f"network.args.{key}={value!r} holds an equals sign, where musubi-tuner would cut "
                "it: it can't be passed on."
            )
        elif key in ("include_patterns", "exclude_patterns"):
            yield f"network.args.{key}: set network.{key.removesuffix('_patterns')} instead."
        elif key not in known:
            yield f"network={network.name} has no argument {key}.{did_you_mean(key, known)}"
        elif key in ("rank_dropout", "module_dropout"):
            if not _number(value) or not 0 <= value < 1:
                yield f"network.args.{key}={value} must be at least 0 and below 1."
        elif key == "loraplus_lr_ratio":
            if not _number(value) or not value > 0:
                yield f"network.args.{key}={value} must be a number above 0."
            elif value != 1 and rules_optimizer.is_prodigy(config):
                yield (
                    f"network.args.{key}={value} makes two learning rates, and Prodigy takes one: "
                    "leave it out, or take another optimizer."
                )
        elif key == "factor" and (
            not isinstance(value, int) or isinstance(value, bool) or value < -1 or value == 0
        ):
            yield f"network.args.factor={value} must be -1 or a whole number above 0."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _timesteps(config: RunConfig) -> Iterator[str]:
    training = config.training
    sigma = training.timestep_sampling == "sigma"
    if training.weighting_scheme in ("logit_normal", "mode") and not sigma:
        yield (
            f"training.weighting_scheme={training.weighting_scheme} draws timesteps, and does so "
            "only with training.timestep_sampling=sigma."
        )
    if sigma and (training.min_timestep is not None or training.max_timestep is not None):
        # It indexes a falling schedule with them, so that 0 is the noisiest.
        yield (
            "training.min_timestep and max_timestep count from the noisy end with "
            "training.timestep_sampling=sigma: take uniform, sigmoid or shift."
        )


def _previews(config: RunConfig) -> Iterator[str]:
    sampling = config.sampling
    if sampling.name != "prompts":
        return
    if config.precision.mixed_precision == "no":
        # Its previews make the text embeddings bf16 and leave the rest to autocast.
        yield (
            f"sampling=prompts fails in musubi-tuner with precision={config.precision.name}, "
            "which has no mixed precision: take precision=bf16, or sampling=none."
        )
    texts = [(f"sampling.prompts[{n}]", text) for n, text in enumerate(sampling.prompts)]
    for key, text in [*texts, ("sampling.negative_prompt", sampling.negative_prompt)]:
        yield from _preview_text(key, text)
    for key, text in texts:
        if not text.strip():
            yield f"{key} is empty."
        elif text.startswith("#"):
            yield f"{key} begins with #, and would be skipped as a comment."
        elif re.match(r"n \S", text.lstrip(), re.IGNORECASE) and not sampling.negative_prompt:
            yield (
                f"{key} begins with {text.lstrip()[:2]!r}, which would be read as a negative "
                "prompt: word it otherwise."
            )
    path = sampling.image_path
    if path is not None:
        yield from _preview_text("sampling.image_path", path)
        if path != path.strip():
            yield f"sampling.image_path={path!r} begins or ends with a space: rename the file."
    if sampling.steps > 1000:
        yield f"sampling.steps={sampling.steps} is too large: at most 1000."
    for key in ("guidance_scale", "flow_shift"):
        value = getattr(sampling, key)
        # The line's numbers are read without a sign or an exponent.
        if not 0.01 <= value <= 1000:
            yield f"sampling.{key}={value:g} must be between 0.01 and 1000."


def _preview_text(key: str, text: str) -> Iterator[str]:
    if " --" in text:
        yield f"{key} has ' --' in it, where musubi-tuner would read an option: leave it out."
    if "\n" in text or "\r" in text:
        yield f"{key} has a line break, where musubi-tuner would begin another prompt."
