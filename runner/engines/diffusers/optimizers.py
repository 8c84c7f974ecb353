"""Build optimizers and learning-rate schedules from musubi-tuner's options."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from runner.core.errors import UserError
from runner.core.text import did_you_mean
from runner.formats.train_options import TrainOptions

Groups = list[dict[str, Any]]


class Scheduler(Protocol):
    """The part of a schedule that the trainer uses."""

    def step(self) -> None:
        """Set the learning rate of the next optimizer step."""


class Constant:
    """A constant learning rate, for optimizers that have a schedule of their own."""

    def step(self) -> None:
        """Do nothing."""


def parse_arguments(arguments: Iterable[str], option: str) -> dict[str, Any]:
    """Parse ``["weight_decay=0.01", "betas=(0.9, 0.99)"]`` into keyword arguments.

    Args:
        arguments: the arguments.
        option: name of the option that has them, for messages.

    Raises:
        UserError: an argument has no ``=``, or its value is no Python literal.
    """
    result: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        try:
            if not equals or not key.strip().isidentifier():
                raise ValueError
            result[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise UserError(
                f"train.toml: {option} {argument!r} must be name=value, value a Python literal"
            ) from None
    return result


def is_schedulefree(options: TrainOptions) -> bool:
    """Return whether the optimizer has its own schedule, and needs train() and eval() calls."""
    return options.optimizer_type.lower().endswith("schedulefree")


def shows_adapted_rate(options: TrainOptions) -> bool:
    """Return whether the optimizer finds its own step size d, so that d * lr is the real rate."""
    name = options.optimizer_type.lower()
    return name.startswith("dadapt") or "prodigy" in name


def build_optimizer(options: TrainOptions, groups: Groups) -> tuple[torch.optim.Optimizer, str]:
    """Build the optimizer.

    Short names are those of musubi-tuner (AdamW8bit, Adafactor, AdamW); any other name is a class
    of torch.optim, or with dots a full class path.

    Returns:
        The optimizer, and its description for the metadata of the LoRA file.

    Raises:
        UserError: there is no such optimizer, its package is not installed, it has 8-bit states and
            there is no CUDA GPU, or it rejects its arguments.
    """
    arguments = parse_arguments(options.optimizer_args, "optimizer_args")
    cls = _optimizer_class(options.optimizer_type)
    rate: float | None = options.learning_rate
    if cls.__name__ == "Adafactor" and cls.__module__.startswith("transformers"):
        arguments.setdefault("relative_step", True)
        arguments["relative_step"] |= bool(arguments.get("warmup_init"))
        if arguments["relative_step"]:
            rate = None
            groups = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
    # One kernel for all tensors of a step: the others read a number for each of them from the GPU,
    # or need memory for a copy of all.
    chosen = arguments.keys() & {"fused", "foreach", "capturable", "differentiable"}
    fused = {"fused": True} if not chosen and _can_be_fused(cls, groups) else {}
    try:
        optimizer = cls(groups, lr=rate, **fused, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"train.toml: optimizer_type={options.optimizer_type!r} refused its options: {error}"
        ) from None
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    name = f"{cls.__module__}.{cls.__name__}"
    return optimizer, f"{name}({text})" if text else name


def _can_be_fused(cls: type, groups: Groups) -> bool:
    on_gpu = all(p.device.type == "cuda" for group in groups for p in group["params"])
    return on_gpu and "fused" in inspect.signature(cls).parameters


def _optimizer_class(name: str) -> type:
    short = name.lower()
    if not name:
        raise UserError("train.toml: optimizer_type is missing; name one, such as AdamW")
    if short.endswith("8bit"):
        return _bitsandbytes(name)
    if short == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor
    if short == "adamw":
        return torch.optim.AdamW
    return _import(name, "torch.optim", "optimizer_type")


def _bitsandbytes(name: str) -> type:
    advice = "use optimizer=adamw"
    if not torch.cuda.is_available():
        raise UserError(f"train.toml: optimizer_type={name!r} needs a CUDA GPU; {advice}")
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            f"train.toml: optimizer_type={name!r} needs bitsandbytes, which is not installed "
            f"(pip install 'hunyuan-lora-runner[gpu]'); {advice}"
        ) from None
    if name.lower() == "adamw8bit":
        return bitsandbytes.optim.AdamW8bit
    return _import(name, "bitsandbytes.optim", "optimizer_type")


def _import(name: str, home: str, option: str) -> type:
    module, _, leaf = name.rpartition(".")
    setting = f"train.toml: {option}={name!r}"
    try:
        imported = importlib.import_module(module or home)
    except ImportError as error:
        package = module.partition(".")[0]
        # The hint would be wrong if a part of the package, or a package it needs, is missing.
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        hint = f" (install it with: {sys.executable} -m pip install {package})" if absent else ""
        raise UserError(f"{setting} cannot be imported: {error}{hint}") from None
    cls = getattr(imported, leaf, None)
    if not isinstance(cls, type):
        classes = [key for key, value in vars(imported).items() if isinstance(value, type)]
        reason = f"{imported.__name__} has no class {leaf}.{did_you_mean(leaf, classes)}"
        raise UserError(f"{setting} cannot be imported: {reason}")
    return cls


def build_scheduler(
    options: TrainOptions, optimizer: torch.optim.Optimizer, total_steps: int
) -> Scheduler:
    """Build the schedule over ``total_steps`` optimizer steps.

    Raises:
        UserError: there is no such schedule, it rejects its options, or it has no warm-up and
            warm-up steps are set.
    """
    if is_schedulefree(options):
        return Constant()
    arguments = parse_arguments(options.lr_scheduler_args, "lr_scheduler_args")
    if options.lr_scheduler_type:
        name = options.lr_scheduler_type
        cls = _import(name, "torch.optim.lr_scheduler", "lr_scheduler_type")
        return _called(name, lambda: cls(optimizer, **arguments))
    warmup = options.lr_warmup_steps
    if isinstance(warmup, float):
        warmup = int(warmup * total_steps)
    name = options.lr_scheduler
    if _is_relative(optimizer):
        from transformers.optimization import AdafactorSchedule

        _refuse_warmup("Adafactor with relative_step", warmup)
        return AdafactorSchedule(optimizer, options.learning_rate)
    if name.lower() == "rex":
        return _called(name, lambda: rex(options, optimizer, warmup, total_steps, **arguments))
    from transformers.optimization import get_scheduler

    extra: dict[str, Any] = dict(arguments)
    if name == "constant":
        _refuse_warmup("lr_scheduler='constant'", warmup)
    elif name == "cosine_with_restarts":
        extra["num_cycles"] = options.lr_scheduler_num_cycles
    elif name == "polynomial":
        extra["power"] = options.lr_scheduler_power
    elif name == "cosine_with_min_lr":
        extra["num_cycles"] = options.lr_scheduler_num_cycles / 2
        extra["min_lr_rate"] = options.lr_scheduler_min_lr_ratio
    elif name == "warmup_stable_decay":
        decay = options.lr_decay_steps
        extra["num_decay_steps"] = int(decay * total_steps) if isinstance(decay, float) else decay
        extra["num_cycles"] = options.lr_scheduler_num_cycles / 2
        extra["min_lr_ratio"] = options.lr_scheduler_min_lr_ratio or 0.0
    elif name == "inverse_sqrt":
        extra["timescale"] = options.lr_scheduler_timescale
    elif name not in ("constant_with_warmup", "linear", "cosine"):
        raise UserError(f"train.toml: lr_scheduler={name!r} is not supported by engine=diffusers")
    return _called(
        name,
        lambda: get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=extra,
        ),
    )


def _is_relative(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("relative_step"))


def _refuse_warmup(what: str, warmup: float) -> None:
    if warmup:
        raise UserError(
            f"train.toml: {what} takes no lr_warmup_steps; use scheduler=constant_with_warmup"
        )


def _called(name: str, build: Any) -> Any:
    try:
        return build()
    except (TypeError, ValueError) as error:
        raise UserError(f"train.toml: lr_scheduler={name!r} refused its options: {error}") from None


def rex(
    options: TrainOptions,
    optimizer: torch.optim.Optimizer,
    warmup: int,
    total: int,
    rex_alpha: float = 0.1,
    rex_beta: float = 0.9,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the REX schedule (arXiv 2107.04197) with musubi-tuner's constants and warm-up.

    With z the share of steps left, the rate falls from its maximum to ``lr_scheduler_min_lr_ratio``
    of it (0.01 if unset) as z / (alpha + beta * z). Warm-up rises linearly from that minimum, which
    is also the rate of the first step.

    Raises:
        ValueError: the ratio is not in 0..1, or the warm-up is longer than the run.
    """
    ratio = options.lr_scheduler_min_lr_ratio
    low = 0.01 if ratio is None else ratio
    if not 0 <= low <= 1:
        raise ValueError(f"lr_scheduler_min_lr_ratio={low} is not in 0..1")
    if warmup > total:
        raise ValueError(f"{warmup} warm-up steps are more than all {total} steps")

    def factor(step: int) -> float:
        if warmup and step <= 1:
            return low
        if step < warmup:
            return low + (1 - low) * (step - 1) / (warmup - 1)
        after, length = step - warmup, total - warmup
        if after >= length:
            return low
        left = (length - after) / length
        return low + (1 - low) * left / (rex_alpha + rex_beta * left)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
