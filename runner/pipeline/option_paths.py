"""Files and folders that options name besides the dataset: made absolute, and looked into."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.paths import existing_file
from runner.engines.base import Engine


def resolve_paths(config: RunConfig, engine: Engine, cwd: Path) -> RunConfig:
    """``config`` with its paths made absolute: commands run in the run's folder, not in ``cwd``.

    What the engine alone takes it settles itself. Raises :class:`UserError` for one that is not
    there, or not what it must be.
    """
    image, weights = config.sampling.image_path, config.network.weights
    if image is not None:
        image = str(existing_file("sampling.image_path", image, cwd))
    if weights is not None:
        file = existing_file("network.weights", weights, cwd)
        _fits(config, file)
        weights = str(file)
    resolved = replace(
        config,
        sampling=replace(config.sampling, image_path=image),
        network=replace(config.network, weights=weights),
    )
    return engine.resolve_paths(resolved, cwd)


def _fits(config: RunConfig, file: Path) -> None:
    """The trainer takes what it can of any file, and says nothing of the rest."""
    from runner.formats.lora import describe

    found, network = describe(file), config.network
    # Saved in bf16, an alpha has three digits.
    same_alpha = math.isclose(network.alpha, found.alpha, rel_tol=0.01)
    if (network.name, network.rank) != (found.kind, found.rank) or not same_alpha:
        raise UserError(
            f"network.weights={file} is not of the run's kind, rank and alpha: add "
            f"network={found.kind} network.rank={found.rank} network.alpha={found.alpha:g}."
        )
