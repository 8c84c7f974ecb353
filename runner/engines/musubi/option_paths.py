"""Files and folders that options of musubi-tuner alone name: made absolute, and looked into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.paths import absolute, existing_file


def resolve_paths(config: RunConfig, cwd: Path) -> RunConfig:
    """``config`` with the state to resume from and the files of ``engine.extra_args`` absolute.

    Raises :class:`UserError` for one that is not there, or not what it must be.
    """
    state = config.training.resume_from
    if state is not None:
        state = str(_state("training.resume_from", state, cwd))
    return replace(
        config,
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
            yield str(_existing_file(name, word, cwd)) if name in _FILE_OPTIONS else word
            continue
        name, equals, inline = word.partition("=")
        if equals and name in _FILE_OPTIONS:
            word = f"{name}={_existing_file(name, inline, cwd)}"
        yield word


def _existing_file(name: str, given: str, cwd: Path) -> Path:
    return existing_file(f"engine.extra_args: {name}", given, cwd)


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
