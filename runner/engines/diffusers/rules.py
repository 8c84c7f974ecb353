"""Rules of the embedded engine on options, checked before anything is read or written; pure.

Each rule is a condition under which its executables would fail once everything is cached, or
silently ignore an option. Rules that all engines share are in :mod:`runner.engines.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.schema import MemoryConfig, ModelConfig, RunConfig, TrainingConfig, options
from runner.engines import rules
from runner.engines.base import Gpu
from runner.engines.diffusers.models import TINY_TRANSFORMER
from runner.engines.memory import filled
from runner.engines.optimizer_classes import class_path
from runner.formats.published_layout import TRANSFORMER_BLOCKS

_TIMESTEP_SAMPLINGS = ("shift", "sigmoid", "uniform")
# The stages that load networks.
_COMPUTING = frozenset(("latents", "text", "train", "evaluate"))
# GPU memory in GB (1,024 MiB) for the whole network without block swap: in bf16 a LoRA of rank 32
# on 25 frames of 960x544 peaked at 23.7 GB (10^9 bytes; docs/development/full-size-truth.md), which
# a GPU of 24 GB has; in fp32 the weights alone are 33 GB.
_HALF_GB, _FP32_GB = 22.0, 44.0


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
    yield from rules.plan_notices(config, steps=steps, clips=clips)
    if gpu is None and config.precision.mixed_precision != "no":
        yield (
            f"precision={config.precision.name} does nothing without a GPU: on the CPU everything "
            "is computed in fp32."
        )
    for key in ("path", "python"):
        if getattr(config.engine, key) is not None:
            yield f"engine.{key} does nothing with engine=diffusers, which is the runner's own."
    for key in ("fp8_text_encoder", "pinned", "h2d_only"):
        if getattr(config.memory, key):
            yield f"memory.{key}=true does nothing with engine=diffusers."
    workers = config.training.data_workers
    if workers != TrainingConfig().data_workers:
        yield (
            f"training.data_workers={workers} does nothing with engine=diffusers, which reads "
            "ahead in one thread."
        )
    for option in options(ModelConfig, "model."):
        name = option.key.removeprefix("model.")
        if name in ("name", "source", "blocks"):
            continue
        if config.model.source == "random" and getattr(config.model, name) != option.default:
            yield (
                f"{option.key} does nothing with model={config.model.name}, whose weights are "
                "made at random."
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
    needed_gb, size = (_FP32_GB, "48") if fp32 else (_HALF_GB, "24")
    if gpu.memory_gb < needed_gb:
        yield (
            f"model={model.name} needs a GPU of {size} GB with engine=diffusers"
            f"{' and weights in fp32' * fp32}, which has no block swap, and {gpu.name} has "
            f"{gpu.memory_gb:.0f} GB: take engine=musubi."
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
    own = MemoryConfig() if memory.name == "auto" else filled(MemoryConfig(), memory.name)
    if memory.blocks_to_swap and memory.blocks_to_swap != own.blocks_to_swap:
        yield (
            f"memory.blocks_to_swap={memory.blocks_to_swap} needs engine=musubi; engine=diffusers "
            "chooses the blocks that wait in main memory itself, from memory.limit_gb."
        )
    if memory.checkpointing == "offload":
        yield (
            "memory.checkpointing=offload needs engine=musubi; engine=diffusers takes none or full."
        )


def _training(config: RunConfig) -> Iterator[str]:
    training = config.training
    if training.attention != "sdpa":
        yield (
            f"training.attention={training.attention} needs engine=musubi; engine=diffusers takes "
            "sdpa."
        )
    if training.save_state or training.resume_from:
        yield "training.save_state and training.resume_from need engine=musubi."
    if training.timestep_sampling not in _TIMESTEP_SAMPLINGS:
        yield (
            f"training.timestep_sampling={training.timestep_sampling} needs "
            "engine=musubi; engine=diffusers takes shift, sigmoid or uniform."
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
