"""The embedded engine's command for each stage; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.engines.base import EngineFacts, Machine, latents_arguments, text_arguments
from runner.formats.train_toml import WeightPaths

_PACKAGE = "runner.engines.diffusers"


class DiffusersEngine:
    """Executables of this package, run by the runner's own Python."""

    def __init__(self, facts: EngineFacts) -> None:
        self.facts = facts

    def _module(self, name: str, *arguments: str) -> Command:
        # One thread is as fast at this size, much faster when the machine is busy, and gives the
        # same sums on machines with different numbers of cores.
        environment = [("OMP_NUM_THREADS", "1")]
        # The run's folder is the working folder, so Python must be told where the runner is when
        # it is used from a checkout that is not installed.
        if self.facts.source_path:
            environment.append(("PYTHONPATH", self.facts.source_path))
        return Command(
            (self.facts.python, "-m", f"{_PACKAGE}.{name}", *arguments),
            set_env=tuple(environment),
        )

    def make_weights(self, folder: str) -> Command:
        """Write the tiny model's random weights."""
        return self._module("make_weights", "--output", folder)

    def cache_latents(
        self, config: RunConfig, weights: WeightPaths, memory: MemoryConfig, dataset_toml: str
    ) -> Command:
        arguments = latents_arguments(config, weights, memory, dataset_toml)
        return self._module("cache_latents", *arguments)

    def cache_text(
        self, config: RunConfig, weights: WeightPaths, memory: MemoryConfig, dataset_toml: str
    ) -> Command:
        return self._module("cache_text", *text_arguments(weights, memory, dataset_toml))

    def train(self, config: RunConfig, options: Mapping[str, Any]) -> Command:
        return self._module("train", "--config_file", "train.toml")

    def evaluate(self, config: RunConfig, dataset_toml: str) -> Command | None:
        return self._module(
            "evaluate",
            *("--config_file", "train.toml"),
            *("--dataset_config", dataset_toml),
            *("--lora", "lora.safetensors"),
            *("--output", "evaluation.json"),
        )

    def files(self, config: RunConfig) -> dict[str, str]:
        return {}

    def compiles(
        self, config: RunConfig, memory: MemoryConfig, machine: Machine | None
    ) -> tuple[bool, str | None]:
        if config.training.compile == "always":
            return False, "training.compile=always has no effect with engine=diffusers."
        return False, None
