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
from runner.engines.base import NO_CARD, Engine, Machine
from runner.pipeline.model import Inputs, Surroundings
from runner.pipeline.stages import STAGES, trains
from runner.storage.store import Store


def look_around(config: RunConfig, cwd: Path, engine: Engine) -> Surroundings:
    """What is here besides the dataset.

    Raises :class:`runner.core.errors.UserError` for an engine's Python that can't be asked.
    """
    root = absolute(config.output_dir, cwd)
    machine, without = find_machine()
    memory, note = engine.memory_plan(config, machine, without)
    weights = engine.weights(config, root)
    facts = engine.locate(config, cwd)
    facts = engine.examine(facts, config, memory, machine, without, trains=trains(config))
    return Surroundings(
        root=root,
        python=sys.executable,
        python_path=checkout(),
        machine=machine,
        memory=memory,
        memory_note=note,
        weights=weights,
        engine=facts,
        cache_identity=engine.cache_identity,
    )


def gather(config: RunConfig, here: Surroundings, sources: Sequence[Source]) -> Inputs:
    """Everything that a plan is made from, given what its sources hold.

    Raises :class:`runner.core.errors.UserError` for sources that can't be trained on.
    """
    fraction = config.dataset.validation_fraction
    chosen = select(sources, task=config.task.name, validation_fraction=fraction)
    weighed, selection = weigh(sources, chosen)
    return Inputs(
        **{item.name: getattr(here, item.name) for item in fields(here)},
        config=config,
        sources=weighed,
        selection=selection,
        cached=Store(here.root / "cache").names(),
        seed=config.training.seed if config.training.seed >= 0 else random.randrange(2**31),
    )


def refusal(config: RunConfig, here: Surroundings) -> str | None:
    """Why a run can't begin on this machine, though it can be planned."""
    for stage in STAGES:
        if why := stage.refusal(config, here):
            return why
    if here.engine.missing:
        return f"engine={config.engine.name}: {here.engine.missing}"
    return None


def find_machine() -> tuple[Machine | None, str]:
    """The first card the driver shows, or None with what is so."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, NO_CARD
    query = [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return None, NO_CARD
    if visible is not None:
        query.append(f"--id={visible.split(',')[0]}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None, "nvidia-smi did not answer"
    said = ((done.stdout + done.stderr).strip().splitlines() or ["it said nothing"])[0]
    if said.startswith("No devices were found"):
        return None, NO_CARD
    if done.returncode:
        return None, f"nvidia-smi failed ({said.rstrip('.')})"
    try:
        name, memory, capability = (part.strip() for part in said.split(","))
        major, minor = capability.split(".")
        return Machine(name, int(memory) / 1024, (int(major), int(minor))), ""
    except ValueError:
        # A card that shares the system's memory (GB10) has [N/A] for its own.
        return None, f"nvidia-smi's answer could not be read ({said})"
