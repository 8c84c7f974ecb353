"""Table of the trainer's options, shared by train.toml and both engines; pure.

Names, types and defaults are those of ``hv_1_5_train_network.py`` in musubi-tuner v0.3.4, whose
``--config_file`` reads train.toml, except for options that only the embedded engine has. An
option that equals the trainer's default is written as well if another default would change the
result. One table has all of them, so the file is longer than others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Literal

from runner.config.schema import MemoryConfig, OptimizerConfig, RunConfig
from runner.formats.train_toml import WeightPaths

NETWORK_MODULES = {
    "lora": "networks.lora_hv_1_5",
    "loha": "networks.loha",
    "lokr": "networks.lokr",
}
# Schedules with a number of cycles, and schedules with a minimum learning rate.
WITH_CYCLES = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")
WITH_MIN_LR = ("cosine_with_min_lr", "rex", "warmup_stable_decay")

SET_BY_RUNNER = "the run's folder, set by the runner"

# What the embedded engine does with an option. ignored: it is accepted without effect, since it
# changes only speed, memory or messages. unsupported: it is accepted only when switched off.
Embedded = Literal["supported", "ignored", "unsupported"]


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """The values that a train.toml is rendered from.

    Attributes:
        config: the run's config.
        weights: the files of the model.
        memory: the memory options of the resolved tier.
        name: the run's name, the default title in the LoRA file.
        resolution: width and height in pixels that most samples are trained at, for the LoRA file.
        seed: the resolved seed.
        compile_blocks: whether the transformer's blocks are compiled.
        engine_only: the options that the engine has besides musubi-tuner's.
    """

    config: RunConfig
    weights: WeightPaths
    memory: MemoryConfig
    name: str
    resolution: tuple[int, int] | None
    seed: int
    compile_blocks: bool
    engine_only: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    """Where the value of one of the trainer's options comes from, and what it is used for.

    Attributes:
        set_by: the runner's option that sets it, or a phrase for what does; None if nothing does.
        value: the dotted key of its value, or the function that returns it; None for the key in
            ``set_by``. An option whose value is None is not written.
        original: its position among the options of the script that the runner grew out of.
        embedded: what the embedded engine does with it.
        engine_only: whether only an engine of the runner has it, and not musubi-tuner.
        in_lora: whether it is written to the LoRA file's metadata, as ``ss_<name>``.
    """

    set_by: str | None
    value: str | Callable[[Rendering], Any] | None
    original: int | None
    embedded: Embedded
    engine_only: bool
    in_lora: bool


def row(
    set_by: str | None = None,
    value: str | Callable[[Rendering], Any] | None = None,
    *,
    default: Any = MISSING,
    original: int | None = None,
    embedded: Embedded = "supported",
    engine_only: bool = False,
    in_lora: bool = False,
) -> Any:
    """Define a dataclass field with its :class:`Row`; a field without a default is required."""
    metadata = {"row": Row(set_by, value, original, embedded, engine_only, in_lora)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _if_attention_is(attention: str) -> Callable[[Rendering], Any]:
    return lambda r: r.config.training.attention == attention or None


def _epochs_to_keep(r: Rendering) -> int | None:
    training = r.config.training
    return training.keep_last if training.save_every_epochs else None


def _steps_to_keep(r: Rendering) -> int | None:
    # musubi-tuner keeps the newest checkpoint, and those of the last so many steps before it.
    keep, steps = r.config.training.keep_last, r.config.training.save_every_steps
    return (keep - 1) * steps if keep and steps else None


def _network_args(r: Rendering) -> list[str] | None:
    network = r.config.network
    patterns = {"include_patterns": network.include, "exclude_patterns": network.exclude}
    args = [f"{key}={list(value)!r}" for key, value in patterns.items() if value]
    return args + [f"{key}={value}" for key, value in network.args.items()] or None


def optimizer_args(optimizer: OptimizerConfig) -> list[str]:
    """Render the optimizer's own arguments as the trainers read them: ``name=<Python literal>``."""
    return [f"{key}={value!r}" for key, value in optimizer.args.items()]


def _for_schedules(names: tuple[str, ...], key: str) -> Callable[[Rendering], Any]:
    return lambda r: getattr(r.config.scheduler, key) if r.config.scheduler.name in names else None


def _drawing_logits(key: str) -> Callable[[Rendering], Any]:
    def value(r: Rendering) -> Any:
        training = r.config.training
        used = training.timestep_sampling == "logsnr" or training.weighting_scheme == "logit_normal"
        return getattr(training, key) if used else None

    return value


def _for_previews(value: Callable[[Rendering], Any]) -> Callable[[Rendering], Any]:
    return lambda r: value(r) if r.config.sampling.name != "none" else None


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of a train.toml, in the order in which they are rendered.

    The embedded engine reads a train.toml into this class. Options that it does not support keep
    their defaults.
    """

    task: str = row("task", "task.name", default="t2v", original=7)
    dit: str = row("model.transformer", lambda r: r.weights.transformer, original=1)
    vae: str | None = row("model.vae", lambda r: r.weights.vae, default=None, original=2)
    text_encoder: str | None = row(
        "model.text_encoder", lambda r: r.weights.text_encoder, default=None, original=3
    )
    byt5: str | None = row("model.byt5", lambda r: r.weights.byt5, default=None, original=4)
    dataset_config: str = row(
        "dataset.path and the options of dataset", lambda _: "dataset.toml", original=6
    )
    sdpa: bool = row(
        "training.attention",
        _if_attention_is("sdpa"),
        default=False,
        original=8,
        embedded="ignored",
    )
    flash_attn: bool = row(
        "training.attention", _if_attention_is("flash"), default=False, embedded="ignored"
    )
    xformers: bool = row(
        "training.attention", _if_attention_is("xformers"), default=False, embedded="ignored"
    )
    mixed_precision: str = row(
        "precision", "precision.mixed_precision", default="no", original=9, in_lora=True
    )
    timestep_sampling: str = row(
        "training.timestep_sampling", default="sigma", original=10, in_lora=True
    )
    discrete_flow_shift: float = row(
        "training.discrete_flow_shift", default=1.0, original=12, in_lora=True
    )
    sigmoid_scale: float = row("training.sigmoid_scale", default=1.0, in_lora=True)
    weighting_scheme: str = row(
        "training.weighting_scheme", default="none", original=11, in_lora=True
    )
    optimizer_type: str = row("optimizer", "optimizer.type", default="", original=13)
    learning_rate: float = row("optimizer.learning_rate", default=2e-6, original=14, in_lora=True)
    max_grad_norm: float = row("training.max_grad_norm", default=1.0, in_lora=True)
    lr_scheduler: str = row("scheduler", "scheduler.name", default="constant", in_lora=True)
    # The runner sets neither of these two; a train.toml written by hand may.
    lr_scheduler_type: str = row(default="")
    lr_scheduler_args: list[str] = row(default=[])
    network_module: str = row(
        "network",
        lambda r: NETWORK_MODULES[r.config.network.name],
        default="",
        original=18,
        in_lora=True,
    )
    network_dim: int | None = row("network.rank", default=None, original=19, in_lora=True)
    network_alpha: float = row("network.alpha", default=1.0, in_lora=True)
    gradient_accumulation_steps: int = row(
        "training.gradient_accumulation_steps", default=1, in_lora=True
    )
    max_data_loader_n_workers: int = row(
        "training.data_workers", default=8, original=16, embedded="ignored"
    )
    seed: int | None = row("training.seed", lambda r: r.seed, default=None, original=22)
    output_dir: str = row(SET_BY_RUNNER, lambda _: "checkpoints", original=23)
    output_name: str = row(SET_BY_RUNNER, lambda _: "lora", original=24, in_lora=True)
    save_precision: str | None = row("training.save_precision", default=None)
    logging_dir: str | None = row(SET_BY_RUNNER, lambda _: "tensorboard", default=None)
    log_with: str = row("tracking", lambda _: "tensorboard", default="tensorboard")
    max_train_epochs: int | None = row(
        "training.epochs",
        lambda r: r.config.training.epochs if r.config.training.max_steps is None else None,
        default=None,
        original=20,
    )
    max_train_steps: int = row("training.max_steps", default=1600)

    image_encoder: str | None = row(
        "model.image_encoder",
        lambda r: r.weights.image_encoder if r.config.task.name == "i2v" else None,
        default=None,
        original=5,
    )
    dit_dtype: str | None = row("precision.dit_dtype", default=None)
    fp8_base: bool = row(
        "precision=fp8",
        lambda r: r.config.precision.fp8_base or None,
        default=False,
        original=25,
        embedded="unsupported",
    )
    fp8_scaled: bool = row(
        "precision=fp8",
        lambda r: r.config.precision.fp8_scaled or None,
        default=False,
        original=26,
        embedded="unsupported",
    )
    fp8_vl: bool = row(
        "memory.fp8_text_encoder",
        lambda r: r.memory.fp8_text_encoder or None,
        default=False,
        original=27,
        embedded="ignored",
    )
    # musubi-tuner requires split_attn with xformers.
    split_attn: bool = row(
        "training.split_attention",
        lambda r: r.config.training.split_attention or _if_attention_is("xformers")(r) or None,
        default=False,
        embedded="ignored",
    )
    compile: bool = row(
        "training.compile",
        lambda r: r.compile_blocks or None,
        default=False,
    )
    # torch's default limit of 8 is too low: in a run with 12 shapes and block swap, shapes after
    # the second were not compiled (docs/development/musubi-proof.md). musubi-tuner recommends 32.
    # engine.extra_args can override it: the command line takes precedence over train.toml.
    compile_cache_size_limit: int | None = row(
        None, lambda r: 32 if r.compile_blocks else None, default=None, embedded="ignored"
    )
    persistent_data_loader_workers: bool = row(
        "training.data_workers",
        lambda r: r.config.training.data_workers != 0 or None,
        default=False,
        original=17,
        embedded="ignored",
    )
    min_timestep: int | None = row("training.min_timestep", default=None)
    max_timestep: int | None = row("training.max_timestep", default=None)
    logit_mean: float = row(
        "training.logit_mean", _drawing_logits("logit_mean"), default=0.0, in_lora=True
    )
    logit_std: float = row(
        "training.logit_std", _drawing_logits("logit_std"), default=1.0, in_lora=True
    )
    mode_scale: float = row(
        "training.mode_scale",
        lambda r: (
            r.config.training.mode_scale if r.config.training.weighting_scheme == "mode" else None
        ),
        default=1.29,
        embedded="ignored",
    )
    preserve_distribution_shape: bool = row(
        "training.preserve_distribution_shape",
        lambda r: r.config.training.preserve_distribution_shape or None,
        default=False,
    )
    num_timestep_buckets: int | None = row(
        "training.num_timestep_buckets", default=None, embedded="unsupported"
    )
    save_every_n_epochs: int | None = row("training.save_every_epochs", default=None, original=21)
    save_every_n_steps: int | None = row("training.save_every_steps", default=None)
    save_last_n_epochs: int | None = row("training.keep_last", _epochs_to_keep, default=None)
    save_last_n_steps: int | None = row("training.keep_last", _steps_to_keep, default=None)
    save_state: bool = row(
        "training.save_state",
        lambda r: r.config.training.save_state or None,
        default=False,
        embedded="unsupported",
    )
    resume: str | None = row("training.resume_from", default=None, embedded="unsupported")
    network_weights: str | None = row("network.weights", default=None)
    network_dropout: float | None = row("network.dropout", default=None, in_lora=True)
    network_args: list[str] = row("network.args", _network_args, default=[])
    optimizer_args: list[str] = row(
        "optimizer.args", lambda r: optimizer_args(r.config.optimizer) or None, default=[]
    )
    lr_warmup_steps: int | float = row(
        "scheduler.warmup_steps",
        lambda r: r.config.scheduler.warmup_steps or None,
        default=0,
        in_lora=True,
    )
    # For cosine_with_min_lr these are half cycles: an even number ends at the full learning rate.
    lr_scheduler_num_cycles: int = row(
        "scheduler.num_cycles", _for_schedules(WITH_CYCLES, "num_cycles"), default=1
    )
    lr_scheduler_power: float = row(
        "scheduler.power", _for_schedules(("polynomial",), "power"), default=1.0
    )
    lr_decay_steps: int | float = row(
        "scheduler.decay_fraction",
        _for_schedules(("warmup_stable_decay",), "decay_fraction"),
        default=0,
    )
    lr_scheduler_timescale: int | None = row(
        "scheduler.timescale", _for_schedules(("inverse_sqrt",), "timescale"), default=None
    )
    lr_scheduler_min_lr_ratio: float | None = row(
        "scheduler.min_lr_ratio", _for_schedules(WITH_MIN_LR, "min_lr_ratio"), default=None
    )

    gradient_checkpointing: bool = row(
        "memory.checkpointing",
        lambda r: r.memory.checkpointing in ("full", "offload") or None,
        default=False,
        original=15,
        in_lora=True,
    )
    gradient_checkpointing_cpu_offload: bool = row(
        "memory.checkpointing=offload",
        lambda r: r.memory.checkpointing == "offload" or None,
        default=False,
        embedded="unsupported",
    )
    blocks_to_swap: int | None = row(
        "memory.blocks_to_swap",
        lambda r: r.memory.blocks_to_swap or None,
        default=None,
        embedded="unsupported",
    )
    use_pinned_memory_for_block_swap: bool = row(
        "memory.pinned",
        lambda r: (r.memory.blocks_to_swap and r.memory.pinned) or None,
        default=False,
        embedded="unsupported",
    )
    block_swap_h2d_only: bool = row(
        "memory.h2d_only",
        lambda r: (r.memory.blocks_to_swap and r.memory.h2d_only) or None,
        default=False,
        embedded="unsupported",
    )
    vae_sample_size: int = row("memory.vae_tile", default=128, embedded="ignored")

    sample_prompts: str | None = row(
        "sampling.prompts", _for_previews(lambda _: "sample_prompts.txt"), default=None
    )
    sample_every_n_epochs: int | None = row(
        "sampling.every_epochs",
        _for_previews(lambda r: r.config.sampling.every_epochs),
        default=None,
    )
    sample_at_first: bool = row(
        "sampling.at_first",
        _for_previews(lambda r: r.config.sampling.at_first or None),
        default=False,
    )

    metadata_title: str | None = row(
        "metadata.title", lambda r: r.config.metadata.title or r.name, default=None
    )
    metadata_author: str | None = row("metadata.author", default=None)
    metadata_description: str | None = row("metadata.description", default=None)
    metadata_license: str | None = row("metadata.license", default=None)
    metadata_tags: str | None = row(
        "metadata.tags", lambda r: ",".join(r.config.metadata.tags) or None, default=None
    )
    # Without it musubi-tuner writes 1280x720 whatever was trained.
    metadata_reso: str | None = row(
        "dataset.resolution", lambda r: r.resolution and "{},{}".format(*r.resolution), default=None
    )
    training_comment: str | None = row("metadata.comment", default=None, in_lora=True)
    # Leave the latent of the first frame unscaled, as musubi-tuner does in training; the published
    # pipelines scale it.
    i2v_unscaled_condition: bool = row(
        "training.i2v_unscaled_condition",
        lambda r: r.config.training.i2v_unscaled_condition if r.config.task.name == "i2v" else None,
        default=False,
        engine_only=True,
    )


TABLE: Mapping[str, Row] = {option.name: option.metadata["row"] for option in fields(TrainOptions)}


def train_options(rendering: Rendering) -> dict[str, Any]:
    """Return the options to write to train.toml and their values, in the order of the file."""
    values = {
        name: _value(option, rendering)
        for name, option in TABLE.items()
        if not option.engine_only or name in rendering.engine_only
    }
    return {name: value for name, value in values.items() if value is not None}


def _value(option: Row, rendering: Rendering) -> Any:
    value = option.set_by if option.value is None else option.value
    if callable(value):
        return value(rendering)
    if value is None:
        return None
    return attrgetter(value)(replace(rendering.config, memory=rendering.memory))
