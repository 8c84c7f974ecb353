"""Interface of a training engine: everything in which engines differ.

That is its rules, its abilities, its location, its memory options for a GPU, the weights it needs,
the command of each stage, and the meaning of a failed process's log. Only
:mod:`runner.engines.registry` knows the engines by name; nothing outside this package does.
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

# Versions before 0.2.0 put the name of the engine that encoded an entry into its cache inputs. Such
# entries are used as they are.
EARLIER_ENCODINGS = ("musubi", "diffusers")

# Why there is no Gpu, unless the driver gives another reason.
NO_GPU = "no GPU was found"


@dataclass(frozen=True)
class Gpu:
    """The GPU that training will run on, as its driver reports it; a GB is 1,024 MiB.

    Attributes:
        name: its name.
        memory_gb: its memory.
        capability: its compute capability.
        used_gb: memory that other programs use.
        programs: those programs with their memory, as far as the driver names them.
        compute_mode: ``Default``, ``Exclusive_Process`` or ``Prohibited``.
    """

    name: str
    memory_gb: float
    capability: tuple[int, int]
    used_gb: float = 0.0
    programs: tuple[str, ...] = ()
    compute_mode: str = "Default"

    @property
    def free_gb(self) -> float:
        """Memory that no program uses."""
        return self.memory_gb - self.used_gb


@dataclass(frozen=True)
class EngineInstall:
    """An engine's location and abilities on this computer.

    Attributes:
        python: path of its Python.
        version: its version, for records.
        source_path: folder to put on PYTHONPATH, for a checkout that is not installed.
        missing: why it cannot run, or None.
        cannot_compile: why torch.compile cannot work with it, or None.
        own_encoding: id that keeps its entries in the shared cache apart from those that its engine
            makes otherwise, or None.
        notice: a notice about it for the plan, or None.
    """

    python: str
    version: str
    source_path: str | None = None
    missing: str | None = None
    cannot_compile: str | None = None
    own_encoding: str | None = None
    notice: str | None = None


@dataclass(frozen=True)
class Job:
    """Everything that the commands of one run depend on.

    Paths in commands are relative to the run's folder unless absolute. ``memory`` has every option
    filled in, and ``root`` is the output folder.
    """

    config: RunConfig
    engine: EngineInstall
    weights: WeightPaths
    memory: MemoryConfig
    root: Path


@dataclass(frozen=True)
class IdleOption:
    """An option that is away from its default and does nothing.

    Attributes:
        key: what to leave out.
        line: why it does nothing, and what to set.
    """

    key: str
    line: str


class Engine(Protocol):
    """A set of executables that accept the files between the stages."""

    @property
    def name(self) -> str:
        """The value of ``engine.name`` that selects it."""

    @property
    def own_encoding(self) -> str | None:
        """Id that keeps its latents and text embeddings in the shared cache apart; None if shared.

        It is None for an engine whose entries have musubi-tuner's names, keys and dtypes, and are
        no further from float32 than 1.2 times musubi-tuner's own: they need not be the same bits
        (docs/development/full-size-truth.md, "VAE and encoders").
        """

    @property
    def own_options(self) -> frozenset[str]:
        """Options of train.toml that its trainer knows in addition to musubi-tuner's."""

    def first_defaults(self, config: RunConfig) -> Mapping[str, Any]:
        """Return the values of options that stand for what its first versions did; pure.

        They are those that differ from the defaults. The digests of a run leave these values out.
        """

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Yield one line for each of its own rules that ``config`` breaks; pure."""

    def plan_problems(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        """Yield one line for each broken rule that depends on the GPU or the data; pure.

        Args:
            job: the run.
            gpu: the GPU, if there is one.
            steps: number of optimizer steps.
            clips: whether the dataset has clips.
        """

    def plan_notices(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        """Yield warnings about settings that do nothing or are probably unintended; pure."""

    def idle_options(self, config: RunConfig, *, only_clips: bool) -> Iterator[IdleOption]:
        """Yield the options that are away from their defaults and do nothing; pure.

        Args:
            config: the run's config.
            only_clips: whether the dataset has clips and no pictures; False if it is not known yet.
        """

    def resolve_paths(self, config: RunConfig, cwd: Path) -> RunConfig:
        """Make the paths of this engine's own options absolute, from ``cwd``. Reads only.

        Raises:
            UserError: a path does not exist, or is not what the option needs.
        """

    def locate(self, config: RunConfig, cwd: Path) -> EngineInstall:
        """Find the engine, or the reason why it cannot run. Reads only."""

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
        """Complete ``install`` with what only its own Python knows. Reads only.

        Args:
            install: the result of :meth:`locate`.
            config: the run's config.
            memory: the memory options of the run.
            gpu: the GPU, if there is one.
            no_gpu_reason: why there is no GPU.
            trains: whether the run will train; if not, its Python need not be started.

        Raises:
            UserError: its Python cannot be started or gives no answer.
        """

    def check(self, job: Job, gpu: Gpu | None, *, trains: bool) -> str:
        """Check, before any stage, that nothing the run needs is missing.

        Returns:
            Its version, for records.

        Raises:
            UserError: something is missing.
        """

    def full_version(self, install: EngineInstall) -> str:
        """Return its version, with those of the runner's own libraries if it uses them."""

    def memory_plan(
        self, config: RunConfig, gpu: Gpu | None, no_gpu_reason: str
    ) -> tuple[MemoryConfig, str | None]:
        """Fill in the memory options for a GPU.

        Returns:
            The options, and a notice if they are a guess.
        """

    def weights(self, config: RunConfig, root: Path) -> LocatedWeights:
        """Locate the weights it needs, present or not; ``root`` is the output folder."""

    def compiles(self, job: Job, gpu: Gpu | None) -> tuple[bool, str | None]:
        """Decide whether to use torch.compile; pure.

        Returns:
            The decision, and a notice if it is off although the config wants it.

        Raises:
            UserError: torch.compile was requested and cannot work.
        """

    def cache_latents(self, job: Job, dataset_toml: str) -> Command:
        """Return the command that encodes latents; pure."""

    def cache_text(self, job: Job, dataset_toml: str) -> Command:
        """Return the command that encodes captions; pure."""

    def train(self, job: Job, options: Mapping[str, Any]) -> Command:
        """Return the trainer's command; ``options`` are those of train.toml; pure."""

    def evaluate(self, job: Job, dataset_toml: str) -> Command | None:
        """Return the command that writes ``evaluation.json``, if the engine has one; pure."""

    def files(self, job: Job, options: Mapping[str, Any]) -> dict[str, str]:
        """Return the text of each file that its commands read in the run's folder; pure.

        Datasets are not among them. ``options`` are those of train.toml. Files that the package
        ships are read from it.
        """

    def failure(self, log: Path, code: int, stage: str, job: Job) -> str:
        """Explain in one line why a process failed, and which options to change if that is known.

        Args:
            log: the process's log.
            code: its exit code; negative for the signal that ended it.
            stage: the name of its stage.
            job: the run.
        """


def latents_arguments(job: Job, dataset_toml: str) -> list[str]:
    """Return the arguments that every engine's script for latents accepts."""
    arguments = ["--dataset_config", dataset_toml, "--vae", job.weights.vae]
    arguments += ["--vae_sample_size", str(job.memory.vae_tile or 0)]
    if job.config.task.name == "i2v":
        arguments += ["--i2v", "--image_encoder", job.weights.image_encoder]
    return arguments


def text_arguments(job: Job, dataset_toml: str) -> list[str]:
    """Return the arguments that every engine's script for text embeddings accepts."""
    return [
        *("--dataset_config", dataset_toml),
        *("--text_encoder", job.weights.text_encoder),
        *("--byt5", job.weights.byt5),
        *("--batch_size", str(job.memory.text_batch_size or 4)),
    ]
