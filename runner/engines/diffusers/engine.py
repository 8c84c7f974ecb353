"""The embedded engine: executables of this package, run by the runner's own Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner import __version__
from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.core.paths import checkout
from runner.core.process import last_error, log_lines
from runner.engines.base import (
    EngineInstall,
    Gpu,
    IdleOption,
    Job,
    latents_arguments,
    text_arguments,
)
from runner.engines.compiling import reason_against
from runner.engines.diffusers import rules
from runner.engines.diffusers.check import (
    check_optimizer,
    is_certain,
    missing_optimizer,
    torch_problem,
)
from runner.engines.diffusers.executables import module_command
from runner.engines.diffusers.weights import model_weights
from runner.engines.failures import Failed, explained
from runner.engines.memory import filled, largest_tier, occupied, tier_size_gb
from runner.engines.musubi.check import cannot_compile
from runner.formats.published_check import check_lora
from runner.formats.train_options import optimizer_args
from runner.formats.train_toml import render
from runner.hub.weights import LocatedWeights

# Compiling for a shape takes about a minute, and saves a little less than a second a step.
_COMPILED_FROM = 90


class DiffusersEngine:
    """The embedded engine: built on libraries from PyPI, in the runner's own environment."""

    name = "diffusers"
    own_encoding: str | None = None
    # Leave the first frame's latent unscaled, as musubi-tuner does in training.
    own_options = frozenset({"i2v_unscaled_condition"})

    def first_defaults(self, config: RunConfig) -> Mapping[str, Any]:
        return {}

    def problems(self, config: RunConfig) -> Iterator[str]:
        return rules.problems(config)

    def plan_problems(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        return rules.plan_problems(job.config, gpu, steps=steps)

    def plan_notices(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        return rules.plan_notices(job.config, gpu, steps=steps, clips=clips)

    def idle_options(self, config: RunConfig, *, only_clips: bool) -> Iterator[IdleOption]:
        return rules.idle_options(config, only_clips=only_clips)

    def resolve_paths(self, config: RunConfig, cwd: Path) -> RunConfig:
        if config.network.weights is not None and config.model.source == "hub":
            check_lora(Path(config.network.weights))
        return config

    def locate(self, config: RunConfig, cwd: Path) -> EngineInstall:
        return EngineInstall(sys.executable, f"runner {__version__}", checkout())

    def examine(
        self,
        install: EngineInstall,
        config: RunConfig,
        memory: MemoryConfig,
        gpu: Gpu | None,
        no_gpu_reason: str,
        *,
        trains: bool,
    ) -> EngineInstall:
        if gpu is None:
            return install
        missing = torch_problem(gpu) or (missing_optimizer(config.optimizer) if trains else None)
        compiling = None
        if trains and config.training.compile != "none" and missing is None:
            compiling = cannot_compile(Command((install.python,)))
        return replace(install, missing=missing or occupied(config, gpu), cannot_compile=compiling)

    def check(self, job: Job, gpu: Gpu | None, *, trains: bool) -> str:
        optimizer = job.config.optimizer
        if trains and not is_certain(optimizer):
            arguments = ["--optimizer_type", optimizer.type]
            arguments += ["--learning_rate", repr(optimizer.learning_rate)]
            arguments += ["--optimizer_args", *optimizer_args(optimizer)]
            check_optimizer(self._command(job, "try_optimizer", *arguments))
        return job.engine.version

    def full_version(self, install: EngineInstall) -> str:
        parts = [f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")]
        return ", ".join([install.version, *parts])

    def memory_plan(
        self, config: RunConfig, gpu: Gpu | None, no_gpu_reason: str
    ) -> tuple[MemoryConfig, str | None]:
        memory, note = config.memory, None
        size_gb = tier_size_gb(memory.name)
        if memory.name == "auto":
            tier = "cpu"
            if gpu is not None:
                tier, note = largest_tier(gpu, no_gpu_reason, memory.limit_gb)
            if memory.limit_gb is not None:
                note = None
            memory = filled(memory, tier)
        elif size_gb is not None and memory.limit_gb is None:
            memory = replace(memory, limit_gb=size_gb)
            note = (
                f"memory={memory.name} is memory.limit_gb={size_gb:g} with engine=diffusers, which "
                "chooses by itself how many blocks wait in main memory."
            )
        return replace(memory, blocks_to_swap=0, fp8_text_encoder=False), note

    def weights(self, config: RunConfig, root: Path) -> LocatedWeights:
        return model_weights(config, root)

    def compiles(self, job: Job, gpu: Gpu | None) -> tuple[bool, str | None]:
        mode = job.config.training.compile
        if mode == "none" or (mode == "auto" and gpu is None):
            return False, None
        why = gpu and reason_against(job.config, gpu, job.engine.cannot_compile)
        if job.config.network.args.get("module_dropout"):
            why = "network.args.module_dropout leaves out other modules at each step"
        if why and mode == "always":
            raise UserError(
                f"training.compile=always: {why}. training.compile=auto goes on without it."
            )
        return not why, f"torch.compile is off: {why}." if why else None

    def cache_latents(self, job: Job, dataset_toml: str) -> Command:
        return self._command(job, "cache_latents", *latents_arguments(job, dataset_toml))

    def cache_text(self, job: Job, dataset_toml: str) -> Command:
        arguments = text_arguments(job, dataset_toml)
        return self._command(job, "cache_text", *arguments, *_memory_limit(job))

    def train(self, job: Job, options: Mapping[str, Any]) -> Command:
        arguments = ["--config_file", "train.toml", *_memory_limit(job)]
        if options.get("compile"):
            arguments += ["--compile_folder", str(job.root / "cache" / "compiled")]
            if job.config.training.compile == "auto":
                arguments += ["--compile_from", str(_COMPILED_FROM)]
        return self._command(job, "train", *arguments)

    def evaluate(self, job: Job, dataset_toml: str) -> Command | None:
        return self._command(
            job,
            "evaluate",
            *("--config_file", "train.toml"),
            *("--dataset_config", dataset_toml),
            *("--lora", "lora.safetensors"),
            *("--output", "evaluation.json"),
            *_memory_limit(job),
        )

    def files(self, job: Job, options: Mapping[str, Any]) -> dict[str, str]:
        return {"train.toml": render(options)}

    def failure(self, log: Path, code: int, stage: str, job: Job) -> str:
        lines = log_lines(log)
        if lines is None:
            return last_error(log)
        reason = explained(Failed(lines, code, stage, job, saves_memory=False))
        return reason.removeprefix("error: ")

    def _command(self, job: Job, name: str, *arguments: str) -> Command:
        return module_command(job.engine.python, job.engine.source_path, name, *arguments)


def _memory_limit(job: Job) -> list[str]:
    limit_gb = job.memory.limit_gb
    return [] if limit_gb is None else ["--memory_limit_gb", repr(limit_gb)]
