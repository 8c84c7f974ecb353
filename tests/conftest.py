"""What the tests share: composing configs, making facts without a disk, running the program."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runner.config.schema import RunConfig

# As the runner does for the tiny model: one thread is faster, most of all on a busy machine. This
# must be said before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

TOP = Path(__file__).resolve().parent.parent
# Recipes that no clip goes with, and so no task=i2v.
PICTURES_ALONE = ("image_only",)


def compose(*overrides: str) -> RunConfig:
    """The config that ``python -m runner`` would get from these overrides; the caller's own."""
    return copy.deepcopy(_composed(overrides))


@cache
def _composed(overrides: tuple[str, ...]) -> RunConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from runner.cli.literal import quote_literals
    from runner.config.groups import conf_folder

    _register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = hydra_compose("config", overrides=quote_literals(overrides, multirun=False))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, RunConfig)
    return config


@cache
def _register() -> None:
    from runner.config import schema

    schema.register()


@dataclass(frozen=True)
class Finished:
    """How the program ended."""

    code: int
    out: str
    err: str


def run_program(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, module: str = "runner"
) -> Finished:
    """Run ``python -m runner`` (or another module) as a person would, in a folder of their own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(TOP), **(env or {})},
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below ``folder`` with its size and time of change."""
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with its golden file; a missing file is written, and the test then fails.

    To regenerate: delete the file, run the test twice, read the diff.
    """

    def check(name: str, text: str) -> None:
        file = TOP / "tests" / "golden" / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            pytest.fail(f"{file} was missing and has been written: read it and run again")
        assert text == file.read_text(encoding="utf-8")

    return check


def fake_item(name: str, **changes: Any) -> Any:
    """An item as a scan finds it: a picture, or a clip when the name says so."""
    import hashlib

    from runner.data.sources import SourceMedia

    video = Path(name).suffix in (".mp4", ".mov", ".webm", ".mkv", ".avi")
    values: dict[str, Any] = {
        "name": name,
        "media_kind": "video" if video else "image",
        "sha256": hashlib.sha256(name.encode()).hexdigest(),
        "bytes": 1000,
        "size": (1280, 720),
        "frames": 49 if video else 1,
        "fps": 24.0 if video else None,
        "mode": None if video else "RGB",
        "caption": f"a caption of {Path(name).stem}",
        "file": Path("/media") / name,
        "archive": None,
        "member": None,
    }
    return SourceMedia(**{**values, **changes})


def fake_facts(
    config: RunConfig,
    items: Sequence[Any],
    *,
    cached: frozenset[str] = frozenset(),
    gpu: Any = None,
    digests: bool = True,
) -> Any:
    """Facts as a disk would give them, with paths that are the same on every machine."""
    from runner.core.command import Command
    from runner.data.balance import weigh
    from runner.data.select import Source, select
    from runner.data.source_options import source_options
    from runner.engines.base import NO_GPU, EngineInstall
    from runner.engines.registry import engine_named
    from runner.formats.train_toml import WeightPaths
    from runner.hub.weights import LocatedWeights
    from runner.pipeline.model import Inputs

    sources = tuple(
        Source(options, "folder", options.path, tuple(items), ())
        for options in source_options(config.dataset)
    )
    sources, selection = weigh(
        sources,
        select(
            sources,
            task=config.task.name,
            validation_fraction=config.dataset.validation_fraction,
        ),
    )
    engine = engine_named(config.engine.name)
    memory, note = engine.memory_plan(config, gpu, NO_GPU)
    parts = ("transformer", "vae", "text_encoder", "byt5", "image_encoder")
    return Inputs(
        root=Path("/outputs"),
        python="/venv/bin/python",
        python_path=None,
        gpu=gpu,
        memory=memory,
        memory_note=note,
        weights=LocatedWeights(
            WeightPaths(*(f"/weights/{part}" for part in parts)),
            {part: part for part in parts} if digests else None,
            (Command(("get-weights",)),),
            "weights",
        ),
        engine=EngineInstall("/engine/bin/python", "engine 1"),
        own_encoding=engine.own_encoding,
        config=config,
        sources=sources,
        selection=selection,
        cached=cached,
        seed=config.training.seed,
    )


def report_of(config: RunConfig, facts: Any, statistics: Any = None, tokens: Any = None) -> Any:
    """The dataset report for fake facts; nobody looks at pixels unless looks are given."""
    from runner.data.report.make import make_report

    return make_report(
        facts.sources,
        facts.selection,
        task=config.task.name,
        statistics=statistics,
        tokens=tokens or {},
    )


def plan_of(config: RunConfig, facts: Any) -> Any:
    """The plan for fake facts."""
    from dataclasses import replace

    from runner.engines.registry import engine_named
    from runner.pipeline.plan import make_plan

    return make_plan(replace(facts, config=config), engine_named(config.engine.name))


def problems_of(config: RunConfig) -> list[str]:
    """Every rule that a config breaks, of all engines and of its own."""
    from runner.config import rules
    from runner.engines.registry import engine_named
    from runner.pipeline import stages

    engine = engine_named(config.engine.name)
    return [*rules.problems(config), *stages.problems(config), *engine.problems(config)]
