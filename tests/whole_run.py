"""A run from its options to its end, in this process, with a stand-in for what its stages do.

The folder, the files, the record and the end are the runner's own; the tiny model's weights are
files of a byte, which no stage here loads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from in_process import composed, handlers_kept

from runner.core.console import Console
from runner.engines.diffusers.make_weights import PARTS
from runner.engines.diffusers.weights import TINY_VERSION
from runner.pipeline.executor import execute, prepare
from runner.pipeline.stages import STAGES
from runner.tracking import mlflow_run

if TYPE_CHECKING:
    from runner.pipeline.context import Context
    from runner.tracking.mlflow_run import NullWriter

# What a stage is to do, by its name; the others do what they do.
Stages = dict[str, Callable[["Context"], None]]


def small_run(outputs: Path, media: Path) -> list[str]:
    """Overrides for a run of the tiny model on pictures of 64x48."""
    return [
        *(f"output_dir={outputs}", f"dataset.path={media}", "dataset.resolution=[64,48]"),
        *("engine=diffusers", "model=tiny", "memory=cpu", "optimizer=adamw", "precision=fp32"),
        "tracking=none",
    ]


def weights_there(outputs: Path) -> None:
    """Put files where the tiny model's weights lie, so that they need not be made."""
    for part in PARTS:
        file = outputs / "cache" / "weights" / f"tiny-{TINY_VERSION}" / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"w")


def carry_out(
    console: Console,
    outputs: Path,
    media: Path,
    *overrides: str,
    stages: Stages | None = None,
    writer: NullWriter | None = None,
) -> None:
    """Carry out a run as ``python -m runner`` does once its config is composed.

    What the run tells MLflow goes to ``writer``.
    """
    weights_there(outputs)
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        for stage in STAGES:
            if (stand_in := (stages or {}).get(stage.name)) is not None:
                patch.setattr(stage, "run", stand_in)
        if writer is not None:
            patch.setattr(mlflow_run, "NullWriter", lambda: writer)
        prepared = prepare(composed(*small_run(outputs, media), *overrides), console, Path.cwd())
        execute(prepared, console, None)


def run_folder_of(outputs: Path) -> Path:
    """The folder of the one run that there was."""
    (folder,) = (outputs / "runs").glob("*/*")
    return folder
