"""What an engine is: everything in which engines differ, asked of one object.

Its rules, what it can do, where it lies, its plan for a GPU's memory, the weights it needs, the
command of each stage, and what the log of a failed process means. :mod:`runner.engines.registry`
knows the engines by name; nothing outside this room does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.formats.train_toml import WeightPaths
from runner.hub.weights import LocatedWeights

# Why there is no Machine, unless the driver has something else to say.
NO_GPU = "no card was found here"


@dataclass(frozen=True)
class Gpu:
    """The card that training will run on, read from its driver."""

    name: str
    memory_gb: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class EngineInstall:
    """Where an engine lies and what it can do there.

    ``missing`` says why it cannot run, ``cannot_compile`` why torch.compile cannot work in it.
    """

    python: str
    version: str
    source_path: str | None = None
    missing: str | None = None
    cannot_compile: str | None = None


@dataclass(frozen=True)
class Job:
    """What the commands of one run are made of.

    Paths in commands are relative to the run's folder unless absolute; ``memory`` has every option
    filled in.
    """

    config: RunConfig
    engine: EngineInstall
    weights: WeightPaths
    memory: MemoryConfig


class Engine(Protocol):
    """A set of executables that accept the files between the stages."""

    @property
    def name(self) -> str:
        """As ``engine.name`` has it."""

    @property
    def engine_cache_id(self) -> str:
        """What tells its latents and text embeddings from those of others in the shared cache."""

    @property
    def own_options(self) -> frozenset[str]:
        """Options of train.toml that its trainer knows beyond musubi-tuner's."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Every rule of its own that ``config`` breaks, one line each; pure."""

    def plan_problems(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        """Rules that need to know the card or the data; pure.

        ``steps`` is the number of optimizer steps, and ``clips`` says whether there are any.
        """

    def plan_notices(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        """What goes through but is hardly what was meant, or does nothing; pure."""

    def resolve_paths(self, config: RunConfig, cwd: Path) -> RunConfig:
        """``config`` with the paths absolute that only it takes, from ``cwd``. Reads only.

        Raises :class:`runner.core.errors.UserError` for one that is not what it must be.
        """

    def locate(self, config: RunConfig, cwd: Path) -> EngineInstall:
        """Where it lies, and why it cannot run if it can't. Reads only."""

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
        """``install`` with what its own Python must be asked, if there will be a training.

        ``no_gpu_reason`` says why there is no ``gpu``. Reads only; raises
        :class:`runner.core.errors.UserError` for a Python that can't be asked.
        """

    def check(self, job: Job, gpu: Gpu | None, *, trains: bool) -> str:
        """Raise :class:`runner.core.errors.UserError` if it lacks what the run will need.

        Asked before any stage; ``trains`` is whether there will be a training. Returns its version
        as records have it.
        """

    def full_version(self, install: EngineInstall) -> str:
        """Its version, with those of the libraries it stands on where they are the runner's."""

    def memory_plan(
        self, config: RunConfig, gpu: Gpu | None, no_gpu_reason: str
    ) -> tuple[MemoryConfig, str | None]:
        """The memory options with everything filled in for a card, and a line if it is a guess."""

    def weights(self, config: RunConfig, root: Path) -> LocatedWeights:
        """Where the weights it needs are or will be; ``root`` is the output folder. Reads only."""

    def compiles(self, job: Job, gpu: Gpu | None) -> tuple[bool, str | None]:
        """Whether to use torch.compile, and why not when it would be expected; pure.

        Raises :class:`runner.core.errors.UserError` when it was asked for and cannot work.
        """

    def cache_latents(self, job: Job, dataset_toml: str) -> Command: ...

    def cache_text(self, job: Job, dataset_toml: str) -> Command: ...

    def train(self, job: Job, options: Mapping[str, Any]) -> Command:
        """The trainer's command; ``options`` are those of train.toml; pure."""

    def evaluate(self, job: Job, dataset_toml: str) -> Command | None:
        """The command that writes ``evaluation.json``, if it has one."""

    def files(self, job: Job, options: Mapping[str, Any]) -> dict[str, str]:
        """Files that its commands read in the run's folder besides datasets, by name; pure.

        ``options`` are those of train.toml. Files of the package are as its code.
        """

    def failure(self, log: Path) -> str:
        """What the log of a process that failed says went wrong, in one line."""


def latents_arguments(job: Job, dataset_toml: str) -> list[str]:
    """Arguments of the script that caches latents, which every engine's takes."""
    arguments = ["--dataset_config", dataset_toml, "--vae", job.weights.vae]
    arguments += ["--vae_sample_size", str(job.memory.vae_tile or 0)]
    if job.config.task.name == "i2v":
        arguments += ["--i2v", "--image_encoder", job.weights.image_encoder]
    return arguments


def text_arguments(job: Job, dataset_toml: str) -> list[str]:
    """Arguments of the script that caches text embeddings, which every engine's takes."""
    return [
        *("--dataset_config", dataset_toml),
        *("--text_encoder", job.weights.text_encoder),
        *("--byt5", job.weights.byt5),
        *("--batch_size", str(job.memory.text_batch_size or 4)),
    ]
