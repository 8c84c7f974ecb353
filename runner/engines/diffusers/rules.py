"""Rules of the embedded engine on options, checked before anything is read or written; pure.

Each rule is a condition under which its executables would fail once everything is cached, or
silently ignore an option. Rules that all engines share are in :mod:`runner.engines.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.rules import value_of
from runner.config.schema import MemoryConfig, ModelConfig, RunConfig, TrainingConfig, options
from runner.engines import rules, rules_idle
from runner.engines.base import Gpu, IdleOption
from runner.engines.diffusers.models import TINY_TRANSFORMER
from runner.engines.memory import filled, tier_size_gb
from runner.engines.optimizer_classes import class_path
from runner.formats.published_layout import TRANSFORMER_BLOCKS

_TIMESTEP_SAMPLINGS = ("shift", "sigmoid", "uniform", "logsnr")
# The stages that load networks.
_COMPUTING = frozenset(("latents", "text", "train", "evaluate"))
# GPU memory in GB (1,024 MiB) that a run needs: in bf16 with all blocks in main memory a LoRA of
# rank 32 on 25 frames of 960x544 took 7.2 of them (docs/performance.md); in fp32 the weights alone
# are 33 GB, and nothing was measured.
_HALF_GB, _FP32_GB = 7.5, 44.0


def problems(config: RunConfig) -> Iterator[str]:
    """Yield one line for each rule that ``config`` breaks."""
    yield from _model(config)
    yield from rules.problems(config)
    yield from _precision(config)
    yield from _memory(config)
    yield from _training(config)
    yield from _of_musubi(config)


def plan_problems(config: RunConfig, gpu: Gpu | None, *, steps: int) -> Iterator[str]:
    """Yield one line for each broken rule that depends on the GPU or the data."""
    yield from rules.plan_problems(config, steps=steps)
    yield from _whole_network(config, gpu)
    path = class_path(config.optimizer.type)
    if gpu is None and (path.startswith("bitsandbytes.") or path.lower().endswith("8bit")):
        yield (
            f"optimizer={config.optimizer.name} needs an NVIDIA GPU, and none was found: take "
            "optimizer=adamw."
        )


def plan_notices(config: RunConfig, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
    """Yield warnings about settings that do nothing or are probably unintended."""
    yield from rules_idle.notices(config, steps=steps, clips=clips)
    if gpu is None and config.precision.mixed_precision != "no":
        yield (
            f"precision={config.precision.name} does nothing without a GPU: on the CPU everything "
            "is computed in fp32."
        )
    for option in _of_others(config):
        yield option.line


def idle_options(config: RunConfig, *, only_clips: bool) -> Iterator[IdleOption]:
    """Yield the options that are away from their defaults and do nothing."""
    yield from rules_idle.idle_options(config, only_clips=only_clips)
    yield from _of_others(config)


def _of_others(config: RunConfig) -> Iterator[IdleOption]:
    """Yield options that only musubi-tuner, or only a model with published weights, obeys."""
    for key in ("path", "python"):
        if getattr(config.engine, key) is not None:
            yield IdleOption(
                f"engine.{key}",
                f"engine.{key} does nothing with engine=diffusers, which is the runner's own: "
                "leave it out, or take engine=musubi.",
            )
    own = _of_tier(config)
    for key in ("fp8_text_encoder", "pinned", "h2d_only"):
        if getattr(config.memory, key) not in (False, getattr(own, key)):
            yield IdleOption(
                f"memory.{key}",
                f"memory.{key}=true does nothing with engine=diffusers: leave it out, or take "
                "engine=musubi.",
            )
    workers = config.training.data_workers
    if workers != TrainingConfig().data_workers:
        yield IdleOption(
            "training.data_workers",
            f"training.data_workers={workers} does nothing with engine=diffusers, which reads "
            "ahead in one thread: leave it out.",
        )
    if config.model.source != "random":
        return
    for option in options(ModelConfig, "model."):
        known = option.key in ("model.name", "model.source", "model.blocks")
        if not known and value_of(config, option.key) != option.default:
            yield IdleOption(
                option.key,
                f"{option.key} does nothing with model={config.model.name}, whose weights are "
                "made at random: leave it out, or take model=hunyuan15_720p.",
            )


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    blocks = TRANSFORMER_BLOCKS if model.source == "hub" else TINY_TRANSFORMER["num_layers"]
    if model.blocks != blocks:
        yield f"model.blocks={model.blocks} can't be: model={model.name} has {blocks}."


def _whole_network(config: RunConfig, gpu: Gpu | None) -> Iterator[str]:
    """Refuse the published weights where they cannot be computed with; fetching them is allowed."""
    model, precision = config.model, config.precision
    if model.source != "hub" or _COMPUTING.issubset(config.stages.skip):
        return
    if gpu is None:
        yield (
            f"model={model.name} needs an NVIDIA GPU, and none was found: take model=tiny for a "
            "rehearsal on the CPU."
        )
        return
    fp32 = precision.mixed_precision == "no" or precision.dit_dtype == "float32"
    needed_gb, size = (_FP32_GB, "48") if fp32 else (_HALF_GB, "8")
    if gpu.memory_gb < needed_gb:
        yield (
            f"model={model.name} needs a GPU of {size} GB with engine=diffusers"
            f"{' and weights in fp32' * fp32}, and {gpu.name} has {gpu.memory_gb:.0f} GB"
            f"{': take precision=bf16' * fp32}."
        )


def _precision(config: RunConfig) -> Iterator[str]:
    precision = config.precision
    if precision.fp8_base:
        yield "precision=fp8 needs engine=musubi; engine=diffusers takes bf16, fp16 or fp32."
    if precision.mixed_precision == "no" and precision.dit_dtype not in (None, "float32"):
        # On a GPU float32 inputs would be mixed with the network's dtype.
        yield "precision.mixed_precision=no needs precision.dit_dtype=float32: take precision=fp32."


def _memory(config: RunConfig) -> Iterator[str]:
    memory = config.memory
    if memory.blocks_to_swap not in (None, 0, _of_tier(config).blocks_to_swap):
        yield (
            f"memory.blocks_to_swap={memory.blocks_to_swap} needs engine=musubi; engine=diffusers "
            "chooses the blocks that wait in main memory itself, from memory.limit_gb."
        )
    if memory.checkpointing == "offload":
        yield (
            "memory.checkpointing=offload needs engine=musubi; engine=diffusers takes none or full."
        )


def _of_tier(config: RunConfig) -> MemoryConfig:
    """Return what a tier named by the run sets for musubi-tuner; here a tier is a limit."""
    name = config.memory.name
    return MemoryConfig() if tier_size_gb(name) is None else filled(MemoryConfig(), name)


def _training(config: RunConfig) -> Iterator[str]:
    training = config.training
    if training.attention != "sdpa":
        yield (
            f"training.attention={training.attention} needs engine=musubi; engine=diffusers takes "
            "sdpa."
        )
    if training.split_attention:
        yield (
            "training.split_attention needs engine=musubi; engine=diffusers leaves padding out of "
            "attention by itself."
        )
    if training.save_state or training.resume_from:
        yield "training.save_state and training.resume_from need engine=musubi."
    if training.timestep_sampling not in _TIMESTEP_SAMPLINGS:
        yield (
            f"training.timestep_sampling={training.timestep_sampling} needs "
            "engine=musubi; engine=diffusers takes shift, sigmoid, uniform or logsnr."
        )
    if training.num_timestep_buckets is not None:
        yield (
            f"training.num_timestep_buckets={training.num_timestep_buckets} needs engine=musubi; "
            "engine=diffusers draws timesteps independently of each other."
        )
    if training.weighting_scheme != "none":
        yield (
            f"training.weighting_scheme={training.weighting_scheme} needs engine=musubi; "
            "engine=diffusers takes none."
        )


def _of_musubi(config: RunConfig) -> Iterator[str]:
    engine = config.engine
    if engine.arguments != "file":
        yield "engine.arguments=command_line needs engine=musubi."
    if engine.extra_args:
        yield "engine.extra_args are arguments of musubi-tuner: they need engine=musubi."
    if engine.cache_args:
        yield "engine.cache_args are arguments of musubi-tuner's scripts: they need engine=musubi."
