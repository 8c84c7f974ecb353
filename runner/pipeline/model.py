"""The inputs of a plan, and the plan itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.data.select import Selection, Source
from runner.engines.base import Engine, EngineInstall, Gpu, Job
from runner.hub.weights import LocatedWeights

State = Literal["done", "to run", "skipped"]


@dataclass(frozen=True)
class RunEnvironment:
    """Everything that a plan depends on except config and dataset: disk, GPU and environment."""

    root: Path
    python: str
    python_path: str | None
    gpu: Gpu | None
    memory: MemoryConfig
    memory_note: str | None
    weights: LocatedWeights
    engine: EngineInstall
    own_encoding: str | None


@dataclass(frozen=True)
class Inputs(RunEnvironment):
    """Everything that a plan depends on; gathered by :mod:`runner.pipeline.inputs`."""

    config: RunConfig
    sources: tuple[Source, ...]
    selection: Selection
    cached: frozenset[str]
    seed: int
    # A notice about the LoRA that the run starts from.
    lora_note: str | None = None
    # Notices about the training state that it resumes from.
    state_notices: tuple[str, ...] = ()

    @property
    def job(self) -> Job:
        """The part that the engine's commands depend on."""
        return Job(self.config, self.engine, self.weights.paths, self.memory, self.root)


@dataclass(frozen=True)
class Planning:
    """The basis of a stage's plan: the inputs, and values computed once for all stages.

    Attributes:
        inputs: the inputs of the plan.
        engine: the run's engine.
        options: the options of train.toml.
        steps: number of optimizer steps.
        epochs: number of epochs, the last of which may not be whole.
        needed: outputs of other stages that the stages to run depend on.
    """

    inputs: Inputs
    engine: Engine
    options: Mapping[str, Any]
    steps: int
    epochs: int
    needed: frozenset[str]


@dataclass(frozen=True)
class CacheEntry:
    """An entry of the shared cache that a run uses.

    Attributes:
        produced: name of the file that the engine writes.
        namespace: ``media``, ``latents`` or ``text``.
        key: its key in the namespace.
        cache_inputs: what the key is the digest of.
        links: paths in the run's folder that are linked to it.
    """

    produced: str
    namespace: str
    key: str
    cache_inputs: dict[str, Any]
    links: tuple[str, ...]

    @property
    def full_key(self) -> str:
        """``namespace/key``."""
        return f"{self.namespace}/{self.key}"


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        files: path and text of each file to write into the run's folder before ``commands``.
        entries: the cache entries that it makes or uses.
        missing: number of things it still has to make.
        outputs: what it makes in the run's folder.
        without_commands: what the runner itself does besides the commands, for ``commands.sh``.
    """

    name: str
    summary: str
    state: State
    commands: tuple[Command, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    entries: tuple[CacheEntry, ...] = ()
    missing: int = 0
    outputs: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    without_commands: str = ""

    @property
    def to_run(self) -> bool:
        """Whether there is something to do."""
        return self.state == "to run"


@dataclass(frozen=True)
class Plan:
    """A run, before it happens."""

    name: str
    stages: tuple[StagePlan, ...]
    files: tuple[tuple[str, str], ...]
    steps: int
    steps_per_epoch: int
    epochs: int
    notices: tuple[str, ...]
    fingerprint: str

    @property
    def entries(self) -> tuple[CacheEntry, ...]:
        """Every cache entry that the run needs."""
        return tuple(entry for stage in self.stages for entry in stage.entries)

    def stage(self, name: str) -> StagePlan:
        """Return the stage of that name.

        Raises:
            KeyError: the plan has none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
