"""Collect the inputs of a plan from the disk, the GPU and the environment; writes nothing."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.paths import absolute, checkout
from runner.data.balance import weigh
from runner.data.select import Source, select
from runner.engines.base import NO_GPU, Engine, Gpu
from runner.pipeline.model import Inputs, RunEnvironment
from runner.pipeline.resumed_state import state_notices
from runner.pipeline.stages import STAGES, trains
from runner.storage.shared_cache import SharedCache

_CSV = "--format=csv,noheader,nounits"


def read_environment(config: RunConfig, cwd: Path, engine: Engine) -> RunEnvironment:
    """Read everything that a plan depends on, except the dataset.

    Raises:
        UserError: the engine's Python cannot be started or gives no answer.
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
        own_encoding=engine.own_encoding or install.own_encoding,
    )


def gather(config: RunConfig, environment: RunEnvironment, sources: Sequence[Source]) -> Inputs:
    """Combine config, environment and scanned sources into the inputs of a plan.

    Raises:
        UserError: the sources cannot be trained on.
    """
    fraction = config.dataset.validation_fraction
    chosen = select(sources, task=config.task.name, validation_fraction=fraction)
    weighed, selection = weigh(sources, chosen)
    return Inputs(
        **{field.name: getattr(environment, field.name) for field in fields(environment)},
        config=config,
        sources=weighed,
        selection=selection,
        cached=SharedCache(environment.root / "cache").full_keys(),
        lora_note=lora_note(config),
        state_notices=tuple(state_notices(config)),
        seed=config.training.seed if config.training.seed >= 0 else random.randrange(2**31),
    )


def lora_note(config: RunConfig) -> str | None:
    """Notice an i2v LoRA that was trained with the condition scaled otherwise than this run's."""
    from runner.formats.lora import UNSCALED_CONDITION, read_metadata

    key, file = "network.weights", config.network.weights
    if file is None and config.training.resume_from is not None:
        # The trainer writes its state beside the LoRA, which alone has metadata.
        key, file = "training.resume_from", config.training.resume_from.removesuffix("-state")
        file += ".safetensors"
    if config.task.name != "i2v" or file is None or not Path(file).is_file():
        return None
    unscaled = config.training.i2v_unscaled_condition
    option = f"training.i2v_unscaled_condition={str(not unscaled).lower()}"
    recorded = read_metadata(Path(file)).get(UNSCALED_CONDITION)
    if recorded is None and not unscaled:
        return (
            f"{key}: {Path(file).name} does not say how its condition was scaled; i2v LoRAs that "
            f"musubi-tuner trained by itself are unscaled, and go on as they began with {option}."
        )
    if recorded in (None, str(unscaled)):
        return None
    return (
        f"{key}: {Path(file).name} was trained with {option}, and this run is not: give it to go "
        "on as it began."
    )


def refusal(config: RunConfig, environment: RunEnvironment) -> str | None:
    """Return the reason why a run can be planned but not started on this computer, or None."""
    for stage in STAGES:
        if reason := stage.refusal(config, environment):
            return reason
    if environment.engine.missing:
        return f"engine={config.engine.name}: {environment.engine.missing}"
    return None


def find_gpu() -> tuple[Gpu | None, str]:
    """Find the first visible GPU.

    Returns:
        The GPU and an empty text, or None and the reason.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, NO_GPU
    columns = "name,memory.total,compute_cap,memory.used,compute_mode"
    query = [tool, f"--query-gpu={columns}", _CSV]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return None, NO_GPU
    if visible is not None:
        query.append(f"--id={visible.split(',')[0]}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None, "nvidia-smi did not answer"
    answer = ((done.stdout + done.stderr).strip().splitlines() or ["it said nothing"])[0]
    if answer.startswith("No devices were found"):
        return None, NO_GPU
    if done.returncode:
        return None, f"nvidia-smi failed ({answer.rstrip('.')})"
    try:
        name, memory, capability, *rest = (part.strip() for part in answer.split(","))
        major, minor = capability.split(".")
        gpu = Gpu(name, int(memory) / 1024, (int(major), int(minor)))
    except ValueError:
        # A GPU that shares the computer's memory (GB10) reports [N/A].
        return None, f"nvidia-smi's answer could not be read ({answer})"
    if len(rest) == 2 and rest[0].isdigit():
        gpu = replace(gpu, used_gb=int(rest[0]) / 1024, compute_mode=rest[1])
    if gpu.used_gb:
        index = visible.split(",")[0] if visible else "0"
        gpu = replace(gpu, programs=_programs([tool, f"--id={index}"]))
    return gpu, ""


def _programs(tool: Sequence[str]) -> tuple[str, ...]:
    """Name the programs that compute on a GPU; inside a container those outside are not listed."""
    query = [*tool, "--query-compute-apps=pid,process_name,used_memory", _CSV]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    # A name may have commas, and the memory may be [N/A].
    lines = re.findall(r"^(\d+), (.+), (\S+)$", done.stdout, re.MULTILINE)
    return tuple(
        f"{Path(name).name}, process {pid}"
        + (f", {int(used) / 1024:.1f} GB" if used.isdigit() else "")
        for pid, name, used in lines
    )
