"""Rules of musubi-tuner v0.3.4 on options, checked before anything is read or written; pure.

Each is a condition under which it would end with an error, often hours into a run, or take an
option for something else without a word. docs/development/musubi-rules.md lists where each comes
from. What it shares with other engines is in :mod:`runner.engines.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from runner.config.schema import MemoryConfig, RunConfig
from runner.engines import rules
from runner.engines.musubi import rules_optimizer
from runner.engines.musubi.rules_arguments import extra_arguments, gives


def problems(config: RunConfig) -> Iterator[str]:
    """Every rule that ``config`` breaks, one line each."""
    yield from _model(config)
    yield from rules.problems(config, more_network_args=("verbose",))
    for rule in (
        rules_optimizer.optimizer,
        _precision,
        _seed,
        _network,
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
    yield from rules.plan_problems(config, steps=steps)
    for key, source in rules.datasets(config):
        dataset = config.dataset
        size = rules.own(source, dataset, "batch_size")
        if not clips or size < 2:
            continue
        # Clips are cached in buckets whatever these say, and then batched by them.
        if not rules.own(source, dataset, "enable_bucket"):
            flag, right = "enable_bucket", "true"
        elif rules.own(source, dataset, "bucket_no_upscale"):
            flag, right = "bucket_no_upscale", "false"
        else:
            continue
        yield (
            f"{key}.batch_size={size} with clips would mix sizes in a batch: take "
            f"{key}.{flag}={right}, or {key}.batch_size=1."
        )


def plan_notices(config: RunConfig, *, steps: int, clips: bool) -> Iterator[str]:
    """What goes through but is hardly what was meant, once the data are known."""
    yield from rules.plan_notices(config, steps=steps, clips=clips)
    if config.training.resume_from:
        yield (
            "training.resume_from gives the trainer weights, optimizer and schedule; musubi-tuner "
            f"counts from 0 again and trains {steps} steps more."
        )


def _precision(config: RunConfig) -> Iterator[str]:
    precision, file = config.precision, config.model.transformer
    mixed, dtype = precision.mixed_precision, precision.dit_dtype
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


def _seed(config: RunConfig) -> Iterator[str]:
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
    """What it would cut at a second equals sign."""
    network = config.network
    for key in ("include", "exclude"):
        for pattern in getattr(network, key):
            if "=" in pattern:
                yield (
                    f"network.{key}: {pattern!r} holds an equals sign, where musubi-tuner would "
                    "cut it: names have none, so word it without (?= and (?<=."
                )
    for key, value in network.args.items():
        if "=" in str(value):
            yield (
                f"network.args.{key}={value!r} holds an equals sign, where musubi-tuner would cut "
                "it: it can't be passed on."
            )


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
    for number, text in enumerate(sampling.prompts):
        if re.match(r"n \S", text.lstrip(), re.IGNORECASE) and not sampling.negative_prompt:
            yield (
                f"sampling.prompts[{number}] begins with {text.lstrip()[:2]!r}, which would be "
                "read as a negative prompt: word it otherwise."
            )
    if sampling.steps > 1000:
        yield f"sampling.steps={sampling.steps} is too large: at most 1000."
