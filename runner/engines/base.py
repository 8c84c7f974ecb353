"""What every engine gives the plan: a command for each stage, as a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.formats.train_toml import WeightPaths

# Why there is no Machine, unless the driver has something else to say.
NO_CARD = "no card was found here"


@dataclass(frozen=True)
class Machine:
    """The card that training will run on, read from its driver."""

    name: str
    memory_gb: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class EngineFacts:
    """Where an engine lies and what it can do.

    ``missing`` says why it cannot run, ``cannot_compile`` why torch.compile cannot work in it.
    """

    python: str
    version: str
    source_path: str | None = None
    missing: str | None = None
    cannot_compile: str | None = None


class Engine(Protocol):
    """Commands for the stages; paths are relative to the run's folder unless absolute."""

    def cache_latents(
        self, config: RunConfig, weights: WeightPaths, memory: MemoryConfig, dataset_toml: str
    ) -> Command: ...

    def cache_text(
        self, config: RunConfig, weights: WeightPaths, memory: MemoryConfig, dataset_toml: str
    ) -> Command: ...

    def train(self, config: RunConfig, options: Mapping[str, Any]) -> Command:
        """The trainer's command; ``options`` are those of train.toml."""

    def evaluate(self, config: RunConfig, dataset_toml: str) -> Command | None:
        """The command that writes ``evaluation.json``, if this engine has one."""

    def files(self, config: RunConfig) -> dict[str, str]:
        """Files of the engine's own that its commands read, by name."""

    def compiles(
        self, config: RunConfig, memory: MemoryConfig, machine: Machine | None
    ) -> tuple[bool, str | None]:
        """Whether to use torch.compile, and why not when it would be expected.

        Raises :class:`runner.core.errors.UserError` when it was asked for and cannot work.
        """


def latents_arguments(
    config: RunConfig, weights: WeightPaths, memory: MemoryConfig, dataset_toml: str
) -> list[str]:
    """Arguments of the script that caches latents, which every engine's takes."""
    arguments = ["--dataset_config", dataset_toml, "--vae", weights.vae]
    arguments += ["--vae_sample_size", str(memory.vae_tile or 0)]
    if config.task.name == "i2v":
        arguments += ["--i2v", "--image_encoder", weights.image_encoder]
    return arguments


def text_arguments(weights: WeightPaths, memory: MemoryConfig, dataset_toml: str) -> list[str]:
    """Arguments of the script that caches text embeddings, which every engine's takes."""
    return [
        *("--dataset_config", dataset_toml),
        *("--text_encoder", weights.text_encoder),
        *("--byt5", weights.byt5),
        *("--batch_size", str(memory.text_batch_size or 4)),
    ]
