"""Rules of musubi-tuner v0.3.4 on options, checked before anything is read or written; pure.

Each rule is a condition under which musubi-tuner would fail, often hours into a run, or silently
misinterpret an option. docs/development/musubi-rules.md gives the source of each. Rules that all
engines share are in :mod:`runner.engines.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from runner.config.schema import MemoryConfig, RunConfig
from runner.engines import rules, rules_idle
from runner.engines.base import IdleOption
from runner.engines.musubi import rules_optimizer
from runner.engines.musubi.rules_arguments import cache_arguments, extra_arguments, gives
from runner.engines.musubi.weights import takes_half
from runner.hub.local_files import is_local


def problems(config: RunConfig) -> Iterator[str]:
    """Yield one line for each rule that ``config`` breaks."""
    yield from _model(config)
    yield from rules.problems(config, more_network_args=("verbose",))
    for rule in (
        rules_optimizer.optimizer,
        _precision,
        _seed,
        _network,
        _timesteps,
        _previews,
        _resume,
        extra_arguments,
        cache_arguments,
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
    """Yield one line for each broken rule that depends on the GPU or the data.

    Args:
        config: the run's config.
        memory: the memory options, completed from the tier.
        steps: number of optimizer steps.
        clips: whether the dataset has clips.
    """
    yield from _block_swap(config, memory)
    yield from rules.plan_problems(config, steps=steps)
    for key, source in rules.datasets(config):
        dataset = config.dataset
        size = rules.own(source, dataset, "batch_size")
        if not clips or size < 2:
            continue
        # Clips are always cached in buckets, but batched by enable_bucket and bucket_no_upscale.
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


def idle_options(config: RunConfig, *, only_clips: bool) -> Iterator[IdleOption]:
    """Yield the options that are away from their defaults and do nothing."""
    yield from rules_idle.idle_options(config, only_clips=only_clips)
    yield from _without_block_swap(config)
    memory = config.memory
    if memory.limit_gb is not None and memory.name != "auto":
        yield IdleOption(
            "memory.limit_gb",
            f"memory.limit_gb={memory.limit_gb:g} does nothing with memory={memory.name} and "
            "engine=musubi: take memory=auto, which chooses a tier by it.",
        )


def _without_block_swap(config: RunConfig) -> Iterator[IdleOption]:
    if config.memory.blocks_to_swap != 0:
        return  # Not known before the plan with memory=auto.
    for name in ("pinned", "h2d_only"):
        if getattr(config.memory, name):
            yield IdleOption(
                f"memory.{name}",
                f"memory.{name}=true does nothing without block swap: leave it out, or set "
                "memory.blocks_to_swap above 0.",
            )


def plan_notices(config: RunConfig, *, steps: int, clips: bool) -> Iterator[str]:
    """Yield warnings about accepted but probably unintended settings."""
    yield from rules_idle.notices(config, steps=steps, clips=clips)
    for option in _without_block_swap(config):
        yield option.line
    if config.training.resume_from:
        yield (
            "training.resume_from gives the trainer weights, optimizer and learning rate; "
            f"musubi-tuner counts from 0 again and trains {steps} steps more."
        )


def _precision(config: RunConfig) -> Iterator[str]:
    precision, file = config.precision, config.model.transformer
    mixed, dtype = precision.mixed_precision, precision.dit_dtype
    if precision.fp8_base and mixed == "no":
        yield "precision.fp8_base=true needs precision.mixed_precision=bf16 or fp16."
    elif mixed == "no" and dtype != "float32":
        # Without autocast, float32 inputs would be mixed with the network's dtype.
        yield "precision.mixed_precision=no needs precision.dit_dtype=float32: take precision=fp32."
    if config.training.attention == "flash" and mixed == "no":
        yield (
            "training.attention=flash needs half precision: take precision=bf16, or "
            "training.attention=sdpa."
        )
    # The header of a file of this computer is read instead (musubi/weights.py).
    if "fp16" in file.lower() and not is_local(file) and not takes_half(precision):
        yield (
            f"model.transformer={file} holds fp16 weights, which can't be trained in "
            f"precision={precision.name}: take precision=fp16, or the bf16 file."
        )


def _seed(config: RunConfig) -> Iterator[str]:
    if config.training.seed > 2**32 - 1:
        yield f"training.seed={config.training.seed} must be below 4294967296."


def _block_swap(config: RunConfig, memory: MemoryConfig) -> Iterator[str]:
    """Check one-way block swap; ``memory`` has the options completed from the tier."""
    one_way = bool(memory.blocks_to_swap and memory.h2d_only)
    if one_way and memory.checkpointing not in ("full", "offload"):
        yield (
            f"memory.h2d_only=true with block swap (memory={memory.name}) needs "
            f"memory.checkpointing=full or offload, not {memory.checkpointing}: take one of them, "
            "or memory.h2d_only=false."
        )
    if not one_way and gives(config, "block_swap_ring_size"):
        yield (
            "engine.extra_args: --block_swap_ring_size does nothing in "
            f"memory={memory.name} without memory.blocks_to_swap above 0 and memory.h2d_only=true."
        )


def _network(config: RunConfig) -> Iterator[str]:
    """Find network options with an equals sign, at which musubi-tuner would split them."""
    network = config.network
    for key in ("include", "exclude"):
        for pattern in getattr(network, key):
            if "=" in pattern:
                yield (
                    f"network.{key}: {pattern!r} contains '=', at which musubi-tuner splits the "
                    "argument: rewrite the pattern without lookaheads (?= and lookbehinds (?<=."
                )
    for key, value in network.args.items():
        if "=" in str(value):
            yield (
                f"network.args.{key}={value!r} contains '=', at which musubi-tuner splits the "
                "argument: it can't be passed on."
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
        # They index a falling schedule, so 0 is the noisiest.
        yield (
            "training.min_timestep and max_timestep count from the noisy end with "
            "training.timestep_sampling=sigma: take uniform, sigmoid or shift."
        )


def _resume(config: RunConfig) -> Iterator[str]:
    """Find options that a state defeats: accelerate loads it after all else was made.

    A schedule over the number of steps would go on from the state's step, over the steps of this
    run alone: past its end a cosine climbs again, and a linear one trains at 0.
    """
    if config.training.resume_from is None:
        return
    if config.scheduler.name not in ("constant", "constant_with_warmup"):
        yield (
            f"scheduler={config.scheduler.name} can't go on with training.resume_from: the state's "
            "steps and this run's would count against this run's number of steps, and reach the "
            "schedule's end too early. Take scheduler=constant, or start from the LoRA alone "
            "(network.weights)."
        )
    if config.network.weights is not None:
        yield (
            "network.weights does nothing with training.resume_from, whose weights replace it: "
            "leave one of them out."
        )


def _previews(config: RunConfig) -> Iterator[str]:
    sampling = config.sampling
    if sampling.name != "prompts":
        return
    if config.precision.mixed_precision == "no":
        # For previews musubi-tuner converts the text embeddings to bf16 and relies on autocast.
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
