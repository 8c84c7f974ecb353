"""Resolve and check the paths of options other than ``dataset.path``."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.paths import existing_file
from runner.engines.base import Engine


def resolve_paths(config: RunConfig, engine: Engine, cwd: Path) -> RunConfig:
    """Make paths absolute, from ``cwd``, because commands run in the run's folder.

    The engine resolves the paths of its own options.

    Raises:
        UserError: a path does not exist, or is not what the option needs.
    """
    image, weights = config.sampling.image_path, config.network.weights
    if image is not None:
        image = str(existing_file("sampling.image_path", image, cwd))
    if weights is not None:
        file = existing_file("network.weights", weights, cwd)
        _check_lora(config, file)
        weights = str(file)
    resolved = replace(
        config,
        sampling=replace(config.sampling, image_path=image),
        network=replace(config.network, weights=weights),
    )
    return engine.resolve_paths(resolved, cwd)


def _check_lora(config: RunConfig, file: Path) -> None:
    """Raise :class:`UserError` for a LoRA that does not fit: the trainer loads just what fits."""
    from runner.formats.lora import describe

    info, network = describe(file), config.network
    # In bf16 alpha is exact to about three digits only.
    same_alpha = math.isclose(network.alpha, info.alpha, rel_tol=0.01)
    if (network.name, network.rank) != (info.kind, info.rank) or not same_alpha:
        raise UserError(
            f"network.weights={file} does not have the run's network, rank and alpha: add "
            f"network={info.kind} network.rank={info.rank} network.alpha={info.alpha:g}."
        )
