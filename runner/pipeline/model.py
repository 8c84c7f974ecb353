"""What a plan is made from, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.schema import MemoryConfig
from runner.core.command import Command
from runner.data.select import Selection, Source
from runner.engines.base import EngineFacts, Machine
from runner.formats.train_toml import WeightPaths


@dataclass(frozen=True)
class WeightFacts:
    """Where the weights are or will be, and the digest of each once they are there."""

    paths: WeightPaths
    digests: dict[str, str] | None
    commands: tuple[Command, ...]
    summary: str

    @property
    def present(self) -> bool:
        return self.digests is not None


@dataclass(frozen=True)
class Facts:
    """What disk, card and environment say; gathered by :mod:`runner.pipeline.inputs`."""

    root: Path
    python: str
    python_path: str | None
    sources: tuple[Source, ...]
    selection: Selection
    weights: WeightFacts
    cached: frozenset[str]
    memory: MemoryConfig
    memory_note: str | None
    machine: Machine | None
    engine: EngineFacts
    seed: int


@dataclass(frozen=True)
class Entry:
    """A cache entry: the file that the engine writes, its place in the store, and its links."""

    produced: str
    shelf: str
    name: str
    made_of: dict[str, Any]
    links: tuple[str, ...]

    @property
    def stored(self) -> str:
        """``shelf/name``."""
        return f"{self.shelf}/{self.name}"


@dataclass(frozen=True)
class Stage:
    """One stage. ``files`` are written into the run's folder before ``commands`` are run."""

    name: str
    summary: str
    state: str
    commands: tuple[Command, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    entries: tuple[Entry, ...] = ()
    missing: int = 0
    outputs: tuple[str, ...] = ()

    @property
    def to_run(self) -> bool:
        return self.state == "to run"


@dataclass(frozen=True)
class Plan:
    """A run, before it happens."""

    name: str
    stages: tuple[Stage, ...]
    files: tuple[tuple[str, str], ...]
    steps: int
    steps_per_epoch: int
    epochs: int
    notices: tuple[str, ...]
    fingerprint: str

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every cache entry that the run counts on."""
        return tuple(entry for stage in self.stages for entry in stage.entries)

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError when the plan has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
