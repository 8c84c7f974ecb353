"""Files and folders that options name besides the dataset: made absolute, and looked into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.paths import absolute


def settle(config: RunConfig, cwd: Path) -> RunConfig:
    """``config`` with its paths made absolute: commands run in the run's folder, not in ``cwd``.

    Raises :class:`UserError` for one that is not there, or not what it must be.
    """
    image, weights = config.sampling.image_path, config.network.weights
    state = config.training.resume_from
    if image is not None:
        image = str(_file("sampling.image_path", image, cwd))
    if weights is not None:
        file = _file("network.weights", weights, cwd)
        _fits(config, file)
        weights = str(file)
    if state is not None:
        state = str(_state("training.resume_from", state, cwd))
    return replace(
        config,
        sampling=replace(config.sampling, image_path=image),
        network=replace(config.network, weights=weights),
        training=replace(config.training, resume_from=state),
        engine=replace(config.engine, extra_args=list(_arguments(config.engine.extra_args, cwd))),
    )


# Options of the trainer that name files, and that the runner has none of its own for.
_FILE_OPTIONS = ("--base_weights", "--log_tracker_config")


def _arguments(words: list[str], cwd: Path) -> Iterator[str]:
    """``engine.extra_args``, which the rules have been through, with their files made absolute."""
    name = ""
    for word in words:
        if not word.startswith("--"):
            yield str(_given_file(name, word, cwd)) if name in _FILE_OPTIONS else word
            continue
        name, equals, inline = word.partition("=")
        if equals and name in _FILE_OPTIONS:
            word = f"{name}={_given_file(name, inline, cwd)}"
        yield word


def _given_file(name: str, given: str, cwd: Path) -> Path:
    return _file(f"engine.extra_args: {name}", given, cwd)


def _file(key: str, given: str, cwd: Path) -> Path:
    path = absolute(given, cwd)
    if not path.is_file():
        raise UserError(f"{key}={given}: there is no such file.")
    return path


def _state(key: str, given: str, cwd: Path) -> Path:
    """A folder that the trainer saved its state in: it loads the files it finds, and no others."""
    folder = absolute(given, cwd)
    if not folder.is_dir():
        raise UserError(f"{key}={given}: there is no such folder.")
    if not (folder / "optimizer.bin").is_file():
        raise UserError(
            f"{key}={given} is no state folder: training.save_state=true makes them, as "
            "checkpoints/lora-state in the run's folder."
        )
    return folder


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
