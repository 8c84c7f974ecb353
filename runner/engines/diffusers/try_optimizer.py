"""Make an optimizer and take one step with it: `python -m runner.engines.diffusers.try_optimizer`.

For classes that the runner does not know: what they lack or refuse is said before anything is
cached. The trainer makes them by the same function.
"""

from __future__ import annotations

import argparse

import torch

from runner.core.errors import UserError
from runner.engines.diffusers import cli, optimizers
from runner.formats.train_options import TrainOptions


def main(arguments: list[str]) -> None:
    """Try the optimizer on one matrix. Raises UserError with what it says."""
    parser = argparse.ArgumentParser(prog="try_optimizer", description=__doc__)
    parser.add_argument("--optimizer_type", required=True, help="name or class path")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--optimizer_args", nargs="*", default=[], help="name=value")
    given = parser.parse_args(arguments)
    options = TrainOptions(dit="", dataset_config="", output_dir="", output_name="", **vars(given))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    group = {"params": [matrix], "lr": given.learning_rate}
    optimizer, _ = optimizers.build_optimizer(options, [group])
    matrix.grad = torch.ones_like(matrix)
    try:
        if callable(train := getattr(optimizer, "train", None)):
            train()
        optimizer.step()
    except Exception as error:
        # A class of anybody's may raise anything.
        raise UserError(
            f"train.toml: optimizer_type={given.optimizer_type!r} failed in its first step: "
            f"{type(error).__name__}: {error}"
        ) from None


if __name__ == "__main__":
    cli.run(main)
