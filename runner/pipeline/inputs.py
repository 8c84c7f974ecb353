"""Reads what a plan needs to know from the disk, the card and the environment; writes nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.paths import absolute, checkout
from runner.data.balance import weigh
from runner.data.select import Source, select
from runner.engines.base import NO_GPU, Engine, Gpu
from runner.pipeline.model import Inputs, RunEnvironment
from runner.pipeline.stages import STAGES, trains
from runner.storage.shared_cache import SharedCache


def read_environment(config: RunConfig, cwd: Path, engine: Engine) -> RunEnvironment:
    """What is here besides the dataset.

    Raises :class:`runner.core.errors.UserError` for an engine's Python that can't be asked.
    """
    root = absolute(config.output_dir, cwd)
    gpu, no_gpu_reason = find_gpu()
    memory, note = engine.memory_plan(config, gpu, no_gpu_reason)
    weights = engine.weights(config, root)
    install = engine.locate(config, cwd)
    install = engine.examine(install, config, memory, gpu, no_gpu_reason, trains=trains(config))
    return RunEnvironment(
        root=root,
        python=sys.executable,
        python_path=checkout(),
        gpu=gpu,
        memory=memory,
        memory_note=note,
        weights=weights,
        engine=install,
        engine_cache_id=engine.engine_cache_id,
    )


def gather(config: RunConfig, environment: RunEnvironment, sources: Sequence[Source]) -> Inputs:
    """Everything that a plan is made from, given what its sources hold.

    Raises :class:`runner.core.errors.UserError` for sources that can't be trained on.
    """
    fraction = config.dataset.validation_fraction
    chosen = select(sources, task=config.task.name, validation_fraction=fraction)
    weighed, selection = weigh(sources, chosen)
    return Inputs(
        **{item.name: getattr(environment, item.name) for item in fields(environment)},
        config=config,
        sources=weighed,
        selection=selection,
        cached=SharedCache(environment.root / "cache").names(),
        seed=config.training.seed if config.training.seed >= 0 else random.randrange(2**31),
    )


def refusal(config: RunConfig, environment: RunEnvironment) -> str | None:
    """Why a run can't begin on this machine, though it can be planned."""
    for stage in STAGES:
        if why := stage.refusal(config, environment):
            return why
    if environment.engine.missing:
        return f"engine={config.engine.name}: {environment.engine.missing}"
    return None


def find_gpu() -> tuple[Gpu | None, str]:
    """The first card the driver shows, or None with what is so."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, NO_GPU
    query = [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return None, NO_GPU
    if visible is not None:
        query.append(f"--id={visible.split(',')[0]}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None, "nvidia-smi did not answer"
    said = ((done.stdout + done.stderr).strip().splitlines() or ["it said nothing"])[0]
    if said.startswith("No devices were found"):
        return None, NO_GPU
    if done.returncode:
        return None, f"nvidia-smi failed ({said.rstrip('.')})"
    try:
        name, memory, capability = (part.strip() for part in said.split(","))
        major, minor = capability.split(".")
        return Gpu(name, int(memory) / 1024, (int(major), int(minor))), ""
    except ValueError:
        # A card that shares the system's memory (GB10) has [N/A] for its own.
        return None, f"nvidia-smi's answer could not be read ({said})"
