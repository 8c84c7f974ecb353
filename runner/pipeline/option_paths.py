"""Resolve and check the paths of options other than ``dataset.path``."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.config.composed import given_keys
from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.paths import existing_file
from runner.engines.base import Engine
from runner.formats.published_check import PART_NAMES
from runner.hub.local_files import existing_folder, existing_weights, is_local
from runner.hub.weights import REPOSITORIES, parts_of
from runner.hub.weights_folder import find_weights
from runner.pipeline.resumed_state import check_state


@dataclass(frozen=True)
class ResolvedWeights:
    """A config whose weights on this computer are absolute paths, and what was noticed.

    Attributes:
        config: the config; a repository that no file comes from is empty in it.
        notices: a line for each thing to know.
    """

    config: RunConfig
    notices: tuple[str, ...]


def resolve_weights(config: RunConfig, overrides: Collection[str], cwd: Path) -> ResolvedWeights:
    """Find the weights that ``model.folder`` and the options of single parts name. Reads only.

    Args:
        config: the run's config.
        overrides: the overrides as typed; a part that one names is not looked for in the folder.
        cwd: the folder that relative paths start at.

    Raises:
        UserError: a path does not exist, or the folder has no part or several files for one.
    """
    model, task = config.model, config.task.name
    if model.source != "hub":
        return ResolvedWeights(config, ())
    given = given_keys(overrides)
    files: dict[str, Any] = {}
    for part in PART_NAMES:
        value = getattr(model, part)
        if is_local(value):
            files[part] = str(existing_weights(f"model.{part}", value, cwd))
    changes: dict[str, Any] = {}
    notices: list[str] = []
    if model.folder:
        folder = existing_folder("model.folder", model.folder, cwd)
        wanted = {
            part: getattr(model, part)
            for part in parts_of(task)
            if part not in files and f"model.{part}" not in given
        }
        found = find_weights(folder, wanted, task)
        files |= {part: str(path) for part, path in found.files.items()}
        notices += found.notices
        changes["folder"] = str(folder)
    for repository, (revision, parts) in REPOSITORIES.items():
        if not all(part in files for part in parts if part in parts_of(task)):
            continue
        changes |= {repository: "", revision: ""}
        notices += [
            f"model.{key} does nothing: all of its files are on this computer."
            for key in (repository, revision)
            if f"model.{key}" in given
        ]
    return ResolvedWeights(
        replace(config, model=replace(model, **changes, **files)), tuple(notices)
    )


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
    resolved = engine.resolve_paths(resolved, cwd)
    check_state(resolved)
    return resolved


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
