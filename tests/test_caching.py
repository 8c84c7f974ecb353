"""What an engine encoded before it failed is kept; what it left half-written is not."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runner.commands import Command
from runner.config import RunConfig
from runner.console import Console
from runner.errors import StageError
from runner.plan_model import Entry, Stage
from runner.stages.caching import fill_and_link
from runner.store import Store

# Writes one whole cache file and the beginning of another, then ends as it is told.
ENGINE = """
import sys, numpy as np
from pathlib import Path
from safetensors.numpy import save
folder = Path("staging/latents-0")
folder.mkdir(parents=True)
data = save({"latents_1x2x2_float32": np.zeros((8, 1, 2, 2), np.float32)})
(folder / "a.safetensors").write_bytes(data)
(folder / "b.safetensors").write_bytes(data if sys.argv[1] == "0" else data[:-7])
sys.exit(int(sys.argv[1]))
"""


@dataclass
class FakeContext:
    """The parts of a run's context that the caching stages use."""

    run_dir: Path
    store: Store
    code: int
    config: RunConfig = field(default_factory=RunConfig)
    console: Console = field(default_factory=lambda: Console.for_stream(io.StringIO()))

    def replan(self) -> Any:
        return self

    @property
    def plan(self) -> Any:
        return self

    def stage(self, name: str) -> Stage:
        entries = tuple(
            Entry(f"{n}.safetensors", "latents", f"{n}{n}.safetensors", {"n": n}, (f"cache/{n}",))
            for n in "ab"
        )
        missing = sum(not self.store.has("latents", entry.name) for entry in entries)
        command = Command((sys.executable, "-c", ENGINE, str(self.code)))
        files = (("staging/latents-0.jsonl", ""),)
        return Stage(name, "", "to run", (command,), files, entries, missing)

    def log(self, stage: str) -> Path:
        return self.run_dir / "logs" / f"{stage}.log"


# A crash after hours of encoding loses the item it was at, and no other.
def test_finished_work_outlives_a_crash(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(StageError):
        fill_and_link(FakeContext(run, store, 3), "latents")  # type: ignore[arg-type]
    assert store.names() == {"latents/aa.safetensors"}
    again = tmp_path / "again"
    again.mkdir()
    fill_and_link(FakeContext(again, store, 0), "latents")  # type: ignore[arg-type]
    assert store.names() == {"latents/aa.safetensors", "latents/bb.safetensors"}
    assert (again / "cache" / "b").is_file()
