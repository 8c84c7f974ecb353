"""Build an optimizer and take one step: ``python -m runner.engines.diffusers.try_optimizer``.

For classes that the runner does not know: missing packages and rejected arguments are reported
before anything is cached. The trainer builds them by the same function.
"""

from __future__ import annotations

import argparse

import torch

from runner.core.errors import UserError
from runner.engines.diffusers import cli, optimizers
from runner.formats.train_options import TrainOptions


def main(arguments: list[str]) -> None:
    """Try the optimizer on one matrix.

    Raises:
        UserError: it cannot be built, or its first step fails.
    """
    parser = argparse.ArgumentParser(prog="try_optimizer", description=__doc__)
    parser.add_argument("--optimizer_type", required=True, help="name or class path")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--optimizer_args", nargs="*", default=[], help="name=value")
    parsed = parser.parse_args(arguments)
    options = TrainOptions(dit="", dataset_config="", output_dir="", output_name="", **vars(parsed))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    group = {"params": [matrix], "lr": parsed.learning_rate}
    optimizer, _ = optimizers.build_optimizer(options, [group])
    matrix.grad = torch.ones_like(matrix)
    try:
        if callable(train := getattr(optimizer, "train", None)):
            train()
        optimizer.step()
    except Exception as error:
        # An unknown class may raise anything.
        raise UserError(
            f"train.toml: optimizer_type={parsed.optimizer_type!r} failed in its first step: "
            f"{type(error).__name__}: {error}"
        ) from None


if __name__ == "__main__":
    cli.run(main)
