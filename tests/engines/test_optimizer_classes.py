"""What is recorded of optimizers is what the libraries have: names, values and usual rates."""

from __future__ import annotations

import inspect
import math
from importlib import import_module
from typing import Any

import pytest
from conftest import compose

from runner.config.groups import conf_folder, groups
from runner.engines.optimizer_classes import ARGUMENTS, TORCH_NAMES, class_path, usual_rates

SHIPPED = [name for name in groups(conf_folder())["optimizer"] if name != "custom"]
# bitsandbytes needs a GPU, and is not installed with the runner.
INSTALLED = [path for path in ARGUMENTS if not path.startswith("bitsandbytes.")]


def class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


# Every argument of a class is recorded and none besides, and its own defaults pass, or the rules
# would refuse what is right and let pass what is wrong.
@pytest.mark.parametrize("path", INSTALLED)
def test_arguments_are_the_classes_own(path: str) -> None:
    parameters = inspect.signature(class_of(path)).parameters
    assert {"params", "lr", *ARGUMENTS[path]} == set(parameters)
    for name, argument in ARGUMENTS[path].items():
        default = parameters[name].default
        # Prodigy's growth_rate; no literal of train.toml is infinite.
        if default != math.inf:
            assert argument.fits(default), (name, default)


# The class of each shipped optimizer is recorded, and so is every one of torch.optim's that needs
# no closure and no sparse gradients; torch's own Adafactor is to be had by its full path alone.
def test_which_classes_are_known() -> None:
    import torch

    for name in SHIPPED:
        assert class_path(compose(f"optimizer={name}").optimizer.type) in ARGUMENTS
    found = {key for key, value in vars(torch.optim).items() if isinstance(value, type)}
    assert found - {"Optimizer", "LBFGS", "SparseAdam", "Adafactor"} == {*TORCH_NAMES, "AdamW"}
    assert {f"torch.optim.{name}" for name in TORCH_NAMES} <= set(ARGUMENTS)


# What is called usual is the rate that the choice of the optimizer has.
@pytest.mark.parametrize("name", SHIPPED)
def test_usual_rates_are_the_shipped_ones(name: str) -> None:
    optimizer = compose(f"optimizer={name}").optimizer
    rates = usual_rates(optimizer)
    assert rates is not None
    assert rates.low < rates.usual == optimizer.learning_rate < rates.high
