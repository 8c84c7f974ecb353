"""Rules of musubi-tuner v0.3.4 on optimizers and learning-rate schedules; pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from runner.config.schema import RunConfig
from runner.core.text import did_you_mean
from runner.formats.train_options import WITH_CYCLES, WITH_LEAST_RATE

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "rex",
)
# Names it knows without a module; every other name without a dot is looked up in torch.optim.
_SHORT_OPTIMIZERS = ("adamw8bit", "adamw", "adafactor")
_TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "Muon", "NAdam"),
    *("RAdam", "RMSprop", "Rprop", "SGD"),
)
# It gives step() no closure, and a LoRA's gradients are dense.
_UNUSABLE_OPTIMIZERS = {"lbfgs": "a closure", "sparseadam": "sparse gradients"}

_ADAMW_ARGS = ("betas", "eps", "weight_decay", "amsgrad")
_TORCH_ARGS = ("maximize", "foreach", "capturable", "differentiable", "fused")
_BNB_ARGS = ("optim_bits", "args", "min_8bit_size", "percentile_clipping", "block_wise", "is_paged")
OPTIMIZER_ARGS = {
    "adamw": (*_ADAMW_ARGS, *_TORCH_ARGS),
    "adamw8bit": (*_ADAMW_ARGS, *_BNB_ARGS),
    "lion8bit": ("betas", "weight_decay", *_BNB_ARGS[1:]),
    "adafactor": (
        *("eps", "clip_threshold", "decay_rate", "beta1", "weight_decay"),
        *("scale_parameter", "relative_step", "warmup_init"),
    ),
    "muon": (
        *("weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"),
        "adjust_lr_fn",
    ),
    "prodigy": (
        *("betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction"),
        *("safeguard_warmup", "d0", "d_coef", "growth_rate", "fsdp_in_use", "slice_p"),
    ),
    "schedulefree_adamw": (
        *("betas", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power", "foreach"),
    ),
}


def ignores_learning_rate(config: RunConfig) -> bool:
    """Whether Adafactor would set its own steps; warmup_init turns relative_step on."""
    args = config.optimizer.args
    return config.optimizer.type.lower() == "adafactor" and bool(
        args.get("relative_step", True) or args.get("warmup_init", False)
    )


def is_schedule_free(config: RunConfig) -> bool:
    """Whether it would leave the schedule out: it goes by the end of the optimizer's name."""
    return config.optimizer.type.lower().endswith("schedulefree")


def is_prodigy(config: RunConfig) -> bool:
    """Whether it is Prodigy or made from it, by its name."""
    return "prodigy" in config.optimizer.type.rpartition(".")[2].lower()


def optimizer(config: RunConfig) -> Iterator[str]:
    """What is wrong with the optimizer's class, or with it and the rest."""
    optimizer, scheduler = config.optimizer, config.scheduler
    kind = optimizer.type
    last = kind.rpartition(".")[2].lower()
    if not kind:
        yield "optimizer.type is empty: name a class, for example torch.optim.RMSprop."
    elif last in _UNUSABLE_OPTIMIZERS:
        yield (
            f"optimizer.type={kind} needs {_UNUSABLE_OPTIMIZERS[last]}, which musubi-tuner does "
            "not give it."
        )
    elif "." not in kind and kind.lower() not in _SHORT_OPTIMIZERS:
        if kind.lower().endswith("8bit"):
            yield (
                f"optimizer.type={kind} needs its full path, for example "
                "bitsandbytes.optim.Lion8bit."
            )
        elif kind not in _TORCH_OPTIMIZERS:
            hint = did_you_mean(kind, [*_SHORT_OPTIMIZERS, *_TORCH_OPTIMIZERS])
            yield f"optimizer.type={kind} is not in torch.optim: give its full path.{hint}"
    relative = optimizer.args.get("relative_step", True)
    if last == "adafactor" and kind.startswith("transformers.") and relative:
        yield (
            f"optimizer.type={kind} takes no learning rate unless optimizer.args.relative_step is "
            "false: take optimizer=adafactor."
        )
    scheduled = scheduler.name != "constant" or scheduler.warmup_steps > 0
    if scheduled and ignores_learning_rate(config):
        yield (
            f"scheduler={scheduler.name} does nothing with Adafactor's relative_step, which sets "
            "its own rate: take scheduler=constant, or optimizer.args.relative_step=false and "
            "optimizer.args.warmup_init=false."
        )
    if scheduled and is_schedule_free(config):
        yield (
            f"scheduler={scheduler.name} does nothing with a schedule-free optimizer: take "
            "scheduler=constant; it warms up by optimizer.args.warmup_steps."
        )
    if is_prodigy(config) and optimizer.learning_rate < 0.1:
        yield (
            f"optimizer.learning_rate={optimizer.learning_rate:g} is too small for Prodigy, which "
            "finds the rate itself and multiplies it by this: take 1.0."
        )


def optimizer_args(config: RunConfig) -> Iterator[str]:
    """What is wrong with the optimizer's own arguments."""
    args = config.optimizer.args
    known = OPTIMIZER_ARGS.get(config.optimizer.name)
    for key, value in args.items():
        if key in ("lr", "params"):
            yield f"optimizer.args.{key} is given already: set optimizer.learning_rate."
        elif known is not None and key not in known:
            yield (
                f"optimizer={config.optimizer.name} has no argument {key}."
                f"{did_you_mean(key, known)}"
            )
        if not _finite(value):
            yield f"optimizer.args.{key}={value} must be finite."
        if "=" in repr(value):
            yield (
                f"optimizer.args.{key}={value!r} holds an equals sign, where musubi-tuner would "
                "cut it: it can't be passed on."
            )


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


def schedule(config: RunConfig) -> Iterator[str]:
    """What is wrong with the learning-rate schedule."""
    scheduler = config.scheduler
    name, ratio = scheduler.name, scheduler.min_lr_ratio
    if name not in SCHEDULERS:
        yield f"scheduler.name={name} is not a choice.{did_you_mean(name, SCHEDULERS)}"
    if ratio is None and name == "cosine_with_min_lr":
        yield "scheduler=cosine_with_min_lr needs scheduler.min_lr_ratio, for example 0.1."
    if ratio is not None and not 0 <= ratio <= 1:
        yield f"scheduler.min_lr_ratio={ratio:g} must be between 0 and 1."
    elif ratio is not None and name not in WITH_LEAST_RATE:
        yield (
            f"scheduler.min_lr_ratio does nothing with scheduler={name}: take "
            "scheduler=cosine_with_min_lr or scheduler=rex."
        )
    if scheduler.num_cycles != 1 and name not in WITH_CYCLES:
        yield (
            f"scheduler.num_cycles does nothing with scheduler={name}: take "
            "scheduler=cosine_with_restarts or scheduler=cosine_with_min_lr."
        )
    if scheduler.power != 1 and name != "polynomial":
        yield f"scheduler.power does nothing with scheduler={name}: take scheduler=polynomial."
    if name == "polynomial" and config.optimizer.learning_rate <= 1e-7:
        yield (
            f"optimizer.learning_rate={config.optimizer.learning_rate:g} must be above 1e-07, "
            "where scheduler=polynomial ends."
        )
