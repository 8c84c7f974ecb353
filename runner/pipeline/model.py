"""What a plan is made from, and what it is made of."""

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
    """What disk, card and environment say, the dataset left aside."""

    root: Path
    python: str
    python_path: str | None
    gpu: Gpu | None
    memory: MemoryConfig
    memory_note: str | None
    weights: LocatedWeights
    engine: EngineInstall
    # The engine's, in whose name entries lie in the shared cache.
    engine_cache_id: str


@dataclass(frozen=True)
class Inputs(RunEnvironment):
    """Everything that a plan is made from; gathered by :mod:`runner.pipeline.inputs`."""

    config: RunConfig
    sources: tuple[Source, ...]
    selection: Selection
    cached: frozenset[str]
    seed: int

    @property
    def job(self) -> Job:
        """What the engine's commands are made of."""
        return Job(self.config, self.engine, self.weights.paths, self.memory)


@dataclass(frozen=True)
class Planning:
    """What a stage is planned from: the inputs, and what was worked out for all stages.

    ``options`` are those of train.toml, ``steps`` the optimizer steps. ``needed`` is what the
    stages that will run need of others.
    """

    inputs: Inputs
    engine: Engine
    options: Mapping[str, Any]
    steps: int
    needed: frozenset[str]


@dataclass(frozen=True)
class CacheEntry:
    """A cache entry: the file that the engine writes, its place in the store, and its links."""

    produced: str
    namespace: str
    name: str
    cache_inputs: dict[str, Any]
    links: tuple[str, ...]

    @property
    def full_key(self) -> str:
        """``shelf/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    ``files`` are written into the run's folder before ``commands`` are run. ``without_commands`` is
    what the runner's own process does beside them, as ``commands.sh`` has it.
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
        """Every cache entry that the run counts on."""
        return tuple(entry for stage in self.stages for entry in stage.entries)

    def stage(self, name: str) -> StagePlan:
        """The stage of that name; KeyError when the plan has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
