"""The optimizers that are known by name: their classes, arguments and usual learning rates; pure.

The arguments are copied from the libraries (torch 2.13, transformers 5.23, prodigyopt 1.1.2,
schedulefree 1.4.1, bitsandbytes 0.50.2), because importing them takes seconds;
``tests/engines/test_optimizer_classes.py`` compares them with the installed libraries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.schema import OptimizerConfig

# Short names, in upper or lower case; any other name without a dot is a class of torch.optim.
_SHORT = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}
SHORT_NAMES = tuple(_SHORT)
TORCH_NAMES = (
    *("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "Muon", "NAdam"),
    *("RAdam", "RMSprop", "Rprop", "SGD"),
)


def class_path(optimizer_type: str) -> str:
    """Return the full path of the class that an ``optimizer.type`` names."""
    if "." in optimizer_type:
        return optimizer_type
    return _SHORT.get(optimizer_type.lower(), f"torch.optim.{optimizer_type}")


def class_name(optimizer_type: str) -> str:
    """Return the name of the class without its module."""
    return class_path(optimizer_type).rpartition(".")[2]


def is_adafactor(optimizer_type: str) -> bool:
    """Return whether it is the Adafactor of transformers, which may set its own learning rate."""
    path = class_path(optimizer_type)
    return path.startswith("transformers.") and path.endswith(".Adafactor")


def ignores_learning_rate(optimizer: OptimizerConfig) -> bool:
    """Return whether Adafactor sets its own rate (relative_step, which warmup_init implies)."""
    args = optimizer.args
    return is_adafactor(optimizer.type) and bool(
        args.get("relative_step", True) or args.get("warmup_init", False)
    )


def is_schedule_free(optimizer_type: str) -> bool:
    """Return whether the trainers use no schedule: both go by the end of the optimizer's name."""
    return optimizer_type.lower().endswith("schedulefree")


def finds_its_rate(optimizer_type: str) -> bool:
    """Return whether it is Prodigy, D-Adaptation or a variant, judged by name."""
    return re.search("prodigy|dadapt", class_name(optimizer_type).lower()) is not None


@dataclass(frozen=True)
class Argument:
    """The values that an argument accepts: a description and a check."""

    description: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(count: int, each: Callable[[Any], bool] = lambda _: True) -> Callable[[Any], bool]:
    def fit(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) == count
            and all(_number(part) and each(part) for part in value)
        )

    return fit


_NUMBER = Argument("a number", _number)
_FROM_0 = Argument("a number, at least 0", lambda v: _number(v) and v >= 0)
_FROM_0_OR_NULL = Argument(
    "a number, at least 0, or null", lambda v: v is None or (_number(v) and v >= 0)
)
_FLAG = Argument("true or false", lambda v: isinstance(v, bool))
_FLAG_OR_NULL = Argument("true, false or null", lambda v: v is None or isinstance(v, bool))
_COUNT = Argument(
    "a whole number above 0", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0
)
_SHARES = Argument(
    "two numbers, each at least 0 and below 1, for example [0.9,0.999]",
    _numbers(2, lambda part: 0 <= part < 1),
)
_PAIR = Argument("two numbers, each at least 0", _numbers(2, lambda part: part >= 0))
_TRIPLE = Argument("three numbers", _numbers(3))
_MUON_RATES = (None, "original", "match_rms_adamw")
_RATE_OF_MUON = Argument(
    "original, match_rms_adamw or null", lambda v: isinstance(v, str | None) and v in _MUON_RATES
)

# The values of each argument name, in all optimizers; exceptions are given with ARGUMENTS.
_BY_NAME: dict[str, Argument] = {
    **dict.fromkeys(
        (
            *("eps", "weight_decay", "momentum", "alpha", "lambd", "t0", "rho", "lr_decay"),
            *("initial_accumulator_value", "momentum_decay", "clip_threshold", "d0", "d_coef"),
            *("growth_rate", "warmup_steps", "r", "weight_lr_power"),
        ),
        _FROM_0,
    ),
    **dict.fromkeys(("decay_rate", "dampening"), _NUMBER),
    **dict.fromkeys(("beta1", "beta3"), _FROM_0_OR_NULL),
    **dict.fromkeys(
        (
            *("amsgrad", "maximize", "capturable", "differentiable", "nesterov", "centered"),
            *("decoupled_weight_decay", "decouple", "use_bias_correction", "safeguard_warmup"),
            *("fsdp_in_use", "scale_parameter", "relative_step", "warmup_init", "is_paged"),
            "silent_sgd_phase",
        ),
        _FLAG,
    ),
    **dict.fromkeys(("foreach", "fused"), _FLAG_OR_NULL),
    **dict.fromkeys(("ns_steps", "slice_p", "min_8bit_size"), _COUNT),
    "betas": _SHARES,
    **dict.fromkeys(("etas", "step_sizes"), _PAIR),
    "ns_coefficients": _TRIPLE,
    "adjust_lr_fn": _RATE_OF_MUON,
}


def _arguments(names: str, **exceptions: Argument) -> dict[str, Argument]:
    return {name: exceptions.get(name, _BY_NAME[name]) for name in names.split()}


_TORCH = " foreach maximize capturable differentiable"
_SCHEDULE_FREE = " weight_decay warmup_steps r weight_lr_power foreach"

ARGUMENTS: Mapping[str, Mapping[str, Argument]] = {
    "torch.optim.ASGD": _arguments("lambd alpha t0 weight_decay" + _TORCH),
    "torch.optim.Adadelta": _arguments("rho eps weight_decay" + _TORCH),
    "torch.optim.Adagrad": _arguments(
        "lr_decay weight_decay initial_accumulator_value eps foreach maximize differentiable fused"
    ),
    "torch.optim.Adam": _arguments(
        "betas eps weight_decay amsgrad fused decoupled_weight_decay" + _TORCH
    ),
    "torch.optim.AdamW": _arguments("betas eps weight_decay amsgrad fused" + _TORCH),
    "torch.optim.Adamax": _arguments("betas eps weight_decay" + _TORCH),
    "torch.optim.Muon": _arguments(
        "weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn"
    ),
    "torch.optim.NAdam": _arguments(
        "betas eps weight_decay momentum_decay decoupled_weight_decay" + _TORCH
    ),
    "torch.optim.RAdam": _arguments("betas eps weight_decay decoupled_weight_decay" + _TORCH),
    "torch.optim.RMSprop": _arguments("alpha eps weight_decay momentum centered" + _TORCH),
    "torch.optim.Rprop": _arguments("etas step_sizes" + _TORCH),
    "torch.optim.SGD": _arguments(
        "momentum dampening weight_decay nesterov maximize foreach differentiable fused"
    ),
    "transformers.optimization.Adafactor": _arguments(
        "eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step "
        "warmup_init",
        eps=_PAIR,
    ),
    "prodigyopt.Prodigy": _arguments(
        "betas beta3 eps weight_decay decouple use_bias_correction safeguard_warmup d0 d_coef "
        "growth_rate fsdp_in_use slice_p"
    ),
    "schedulefree.AdamWScheduleFree": _arguments("betas eps" + _SCHEDULE_FREE, foreach=_FLAG),
    "schedulefree.SGDScheduleFree": _arguments("momentum" + _SCHEDULE_FREE, foreach=_FLAG),
    "schedulefree.RAdamScheduleFree": _arguments(
        "betas eps weight_decay r weight_lr_power foreach silent_sgd_phase", foreach=_FLAG
    ),
    # Without amsgrad, optim_bits and args, which it accepts and ignores.
    "bitsandbytes.optim.AdamW8bit": _arguments("betas eps weight_decay min_8bit_size is_paged"),
    "bitsandbytes.optim.Lion8bit": _arguments("betas weight_decay min_8bit_size is_paged"),
}


@dataclass(frozen=True)
class Rates:
    """The range of learning rates that train a LoRA at all, and the usual one."""

    low: float
    high: float
    usual: float


# The first pattern that fits the class's name counts. The usual rates are those of conf/optimizer;
# a hundredth of one hardly moves a LoRA in a run's steps, a hundred times as much mostly diverges.
_RATES = (
    # They multiply the rate that they find.
    (r"prodigy|dadapt", Rates(0.1, 10, 1.0)),
    # Its steps are orthogonal matrices, whose size does not follow the gradient's.
    (r"muon", Rates(1e-5, 1e-1, 1e-3)),
    # Every step is a sign: its authors advise a third to a tenth of AdamW's rate.
    (r"lion", Rates(2e-7, 2e-3, 2e-5)),
    (r"sgd", Rates(1e-4, 10, 1e-1)),
    (r"adafactor|adam|rmsprop|lamb", Rates(1e-6, 1e-2, 1e-4)),
)


def usual_rates(optimizer: OptimizerConfig) -> Rates | None:
    """Return the usual learning rates of an optimizer; None if they are not known."""
    name = class_name(optimizer.type).lower()
    rates = next((rates for pattern, rates in _RATES if re.search(pattern, name)), None)
    if rates and is_adafactor(optimizer.type) and optimizer.args.get("scale_parameter", True):
        # It multiplies the rate by the size of the weights, which begin at zero.
        return Rates(rates.low, 1.0, 1e-2)
    return rates
