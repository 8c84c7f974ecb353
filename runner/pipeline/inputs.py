"""Reads what a plan needs to know from the disk, the card and the environment; writes nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from runner.config.groups import conf_folder
from runner.config.schema import MemoryConfig, RunConfig
from runner.core.paths import absolute, checkout
from runner.data.balance import weigh
from runner.data.ingest import Reading, scan_sources
from runner.data.select import Selection, Source, select
from runner.engines.base import NO_CARD, EngineFacts, Machine
from runner.pipeline.model import Facts, WeightFacts
from runner.pipeline.stages.weights import weight_facts
from runner.storage.store import Store


def gather(config: RunConfig, cwd: Path, reading: Reading | None = None) -> Facts:
    """Everything :func:`runner.pipeline.plan.make_plan` needs.

    Raises :class:`runner.core.errors.UserError` for input that cannot be trained on.
    """
    root = absolute(config.output_dir, cwd)
    machine, without = find_machine()
    memory, note = memory_tier(config, machine, without)
    weights = weight_facts(config, root)
    engine = with_compiling(engine_facts(config, cwd), config, memory, machine, without)
    reading = reading or Reading()
    if reading.keep and (why := refusal(config, weights, engine)):
        # Sources may be refused first; but nothing is unpacked for a run that can't be.
        reading = replace(reading, keep=False, refused=why)
    sources, selection = weigh(*_selected(config, cwd, root, reading))
    return Facts(
        root=root,
        python=sys.executable,
        python_path=checkout(),
        sources=sources,
        selection=selection,
        weights=weights,
        cached=Store(root / "cache").names(),
        memory=memory,
        memory_note=note,
        machine=machine,
        engine=engine,
        seed=config.training.seed if config.training.seed >= 0 else random.randrange(2**31),
    )


def _selected(
    config: RunConfig, cwd: Path, root: Path, reading: Reading
) -> tuple[tuple[Source, ...], Selection]:
    sources = scan_sources(config, cwd, Store(root / "cache"), reading)
    fraction = config.dataset.validation_fraction
    return sources, select(sources, task=config.task.name, validation_fraction=fraction)


def refresh(facts: Facts, config: RunConfig) -> Facts:
    """The same facts with weights and cache looked at again."""
    return replace(
        facts,
        weights=weight_facts(config, facts.root),
        cached=Store(facts.root / "cache").names(),
    )


def refusal(config: RunConfig, weights: WeightFacts, engine: EngineFacts) -> str | None:
    """Why a run can't begin on this machine, though it can be planned."""
    if "weights" in config.stages.skip and not weights.present:
        return "stages.skip=[weights], but the weights are not all on this machine yet."
    if engine.missing:
        return f"engine={config.engine.name}: {engine.missing}"
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


TIERS = (("12gb", 11.0), ("16gb", 15.0), ("24gb", 22.0), ("48gb", 44.0), ("80gb", 76.0))


def tier_name(
    config: RunConfig, machine: Machine | None, without: str = NO_CARD
) -> tuple[str, str | None]:
    """The memory tier for ``memory=auto``, and a line that says why when it was a guess."""
    if config.engine.name == "diffusers" and machine is None:
        return "cpu", None
    if machine is None:
        told = without.replace("no card", "No card")
        return "24gb", f"{told}: memory=auto is planned as memory=24gb."
    fitting = [name for name, least in TIERS if machine.memory_gb >= least]
    if fitting:
        return fitting[-1], None
    return "12gb", (
        f"{machine.name} has {machine.memory_gb:.0f} GB, less than the smallest tier: planned as "
        "memory=12gb."
    )


def memory_tier(
    config: RunConfig, machine: Machine | None, without: str = NO_CARD
) -> tuple[MemoryConfig, str | None]:
    """The memory options with everything filled in from the tier."""
    if config.memory.name != "auto":
        return config.memory, None
    from omegaconf import OmegaConf

    name, note = tier_name(config, machine, without)
    file = conf_folder() / "memory" / f"{name}.yaml"
    tier: Any = OmegaConf.to_container(OmegaConf.load(file))
    chosen = {
        item.name: (
            own if (own := getattr(config.memory, item.name)) is not None else tier[item.name]
        )
        for item in fields(MemoryConfig)
        if item.name != "name"
    }
    return MemoryConfig(name=name, **chosen), note


def engine_facts(config: RunConfig, cwd: Path) -> EngineFacts:
    """Where the chosen engine lies, and why it cannot run if it can't."""
    from runner import __version__
    from runner.engines.musubi.packages import COMMAND, VERSION, engine_home, python_of

    if config.engine.name == "diffusers":
        return EngineFacts(sys.executable, f"runner {__version__}", checkout())
    home = engine_home()
    python = python_of(home)
    places: list[Path] = []
    source: Path | None = None
    missing: str | None = None
    if config.engine.path is not None:
        source = absolute(config.engine.path, cwd)
        # musubi-tuner's README names the first for pip, and uv's own name is the second.
        places = [source / name / "bin" / "python" for name in ("venv", ".venv")]
        python = next((place for place in places if place.is_file()), places[0])
        if not (source / "src" / "musubi_tuner").is_dir():
            missing = f"engine.path={config.engine.path} is no musubi-tuner checkout"
    if config.engine.python is not None:
        python, places = absolute(config.engine.python, cwd), []
    ours = config.engine.path is None and config.engine.python is None
    if ours and not ((home / "installed.json").is_file() and python.is_file()):
        what = "half installed" if (home / "venv").exists() else "not installed"
        missing = f"musubi-tuner {VERSION} is {what} in {home}: run {COMMAND}"
    elif missing is None and not python.is_file():
        missing = f"there is no Python at {' or '.join(map(str, places or [python]))}"
    if missing is not None:
        missing += ". Or point" if ours else ". Point"
        missing += (
            " engine.path and engine.python to an installed musubi-tuner, or rehearse "
            "without it: engine=diffusers model=tiny."
        )
    if source is None:
        return EngineFacts(str(python), f"musubi-tuner {VERSION}", None, missing)
    version = _checkout_version(source) or "of an unknown version"
    return EngineFacts(str(python), f"musubi-tuner {version}", str(source / "src"), missing)


def with_compiling(
    facts: EngineFacts,
    config: RunConfig,
    memory: MemoryConfig,
    machine: Machine | None,
    without: str = NO_CARD,
) -> EngineFacts:
    """``facts`` with whether torch.compile can work there, where a training on a card asks it."""
    if machine is None:
        return replace(facts, cannot_compile=without)
    mode = config.training.compile
    wanted = mode == "always" or (mode == "auto" and not memory.blocks_to_swap)
    if config.engine.name != "musubi" or facts.missing or not wanted:
        return facts
    if "train" in config.stages.skip:
        return facts
    from runner.engines.musubi.check import cannot_compile
    from runner.engines.musubi.engine import MusubiEngine

    return replace(facts, cannot_compile=cannot_compile(MusubiEngine(facts).python()))


def _checkout_version(source: Path) -> str | None:
    """The version that a checkout of musubi-tuner says it has, as a tag is named."""
    try:
        project = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))["project"]
        return f"v{project['version']}"
    except (OSError, ValueError, KeyError):
        return None
