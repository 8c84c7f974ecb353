"""Resolve and check the paths of options that only musubi-tuner has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.paths import absolute, existing_file


def resolve_paths(config: RunConfig, cwd: Path) -> RunConfig:
    """Make ``training.resume_from`` and the files of ``engine.extra_args`` absolute, from ``cwd``.

    Raises:
        UserError: a path does not exist, or is not what the option needs.
    """
    state = config.training.resume_from
    if state is not None:
        state = str(_state("training.resume_from", state, cwd))
    return replace(
        config,
        training=replace(config.training, resume_from=state),
        engine=replace(config.engine, extra_args=list(_arguments(config.engine.extra_args, cwd))),
    )


# Options of the trainer that name files and have no counterpart among the runner's options.
_FILE_OPTIONS = ("--base_weights", "--log_tracker_config")


def _arguments(words: list[str], cwd: Path) -> Iterator[str]:
    """Yield ``engine.extra_args``, already checked by the rules, with absolute files."""
    name = ""
    for word in words:
        if not word.startswith("--"):
            yield str(_existing_file(name, word, cwd)) if name in _FILE_OPTIONS else word
            continue
        name, equals, inline = word.partition("=")
        if equals and name in _FILE_OPTIONS:
            word = f"{name}={_existing_file(name, inline, cwd)}"
        yield word


def _existing_file(name: str, text: str, cwd: Path) -> Path:
    return existing_file(f"engine.extra_args: {name}", text, cwd)


def _state(key: str, text: str, cwd: Path) -> Path:
    """Check a folder of training state: the trainer ignores files that are missing in it."""
    folder = absolute(text, cwd)
    if not folder.is_dir():
        raise UserError(f"{key}={text}: there is no such folder.")
    if not (folder / "optimizer.bin").is_file():
        raise UserError(
            f"{key}={text} is no state folder: training.save_state=true makes them, as "
            "checkpoints/lora-state in the run's folder."
        )
    return folder
