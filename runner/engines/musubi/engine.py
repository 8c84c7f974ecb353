"""musubi-tuner as an engine: its command for each stage, and what else is asked of an engine.

Written against v0.3.4 (commit 30c658c). Its package is run as modules, so that it makes no
difference whether it was installed or lies in a checkout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.engines.base import (
    NO_CARD,
    EngineFacts,
    Job,
    Machine,
    latents_arguments,
    text_arguments,
)
from runner.engines.memory import filled, largest_tier
from runner.engines.musubi import rules
from runner.engines.musubi.check import cannot_compile, check_environment
from runner.engines.musubi.failure import failure
from runner.engines.musubi.location import located
from runner.engines.musubi.original import command_line
from runner.formats.train_toml import render
from runner.hub.weights import WeightFacts, hub_weights

# Read by accelerate instead of the user's own default file, which could ask for several cards.
_ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
num_processes: 1
num_machines: 1
machine_rank: 0
main_training_function: main
use_cpu: false
"""

# Written into the run's folder, where every command runs, so that they can be repeated by hand.
_CORRECTED = """\
# Runs a module with some things set right that musubi-tuner gets wrong: corrected.py -m MODULE ...
import ctypes
import glob
import os
import platform
import runpy
import signal
import sys

del sys.argv[:2]
module = sys.argv[0]

# accelerate starts the trainer, which would go on by itself when that is killed.
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

# A shell may hold what makes accelerate wait for other processes (of torchrun, Slurm and MPI) or
# overrides its arguments (ACCELERATE_*, which its launcher then sets for the trainer); what makes
# transformers 4 look for tokenizers elsewhere than in the hub's cache; and secrets.
gone = "LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PMI_SIZE"
gone += " OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE"
gone += " TRANSFORMERS_CACHE PYTORCH_TRANSFORMERS_CACHE PYTORCH_PRETRAINED_BERT_CACHE"
if "HF_HUB_OFFLINE" in os.environ:
    gone += " HF_TOKEN HUGGING_FACE_HUB_TOKEN"
starts = ("MLFLOW_", "ACCELERATE_")[: 1 if module.endswith("train_network") else 2]
for name in [*os.environ]:
    if name in gone.split() or name.startswith(starts):
        del os.environ[name]

# Samples of many shapes leave PyTorch's memory in pieces: 24.8 GB in use on a card where 21.9 do
# with segments that grow. WSL has none of those. Torch 2.9 reads only the older of the two names.
names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
wsl = "microsoft" in platform.release().lower()
if sys.platform == "linux" and not wsl and not any(name in os.environ for name in names):
    os.environ[names[0]] = "expandable_segments:True"

# It takes its items in the order in which the file system lists the cache, which differs from disk
# to disk, and with it what a seed gives.
found = glob.glob
glob.glob = lambda *args, **kwargs: sorted(found(*args, **kwargs))

# Its text encoder's head gives each token a score for every word, and is never read: 1.4 GB, too
# much for a card of 12 GB.
if module.endswith("cache_text_encoder_outputs"):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration as Encoder

    def headless(self, *args, forward=Encoder.forward, **kwargs):
        self.lm_head = torch.nn.Identity()
        return forward(self, *args, **kwargs, logits_to_keep=1)

    Encoder.forward = headless

runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def _corrected(script: str) -> tuple[str, ...]:
    return ("corrected.py", "-m", f"musubi_tuner.{script}")


def python_command(facts: EngineFacts, *arguments: str, offline: bool = True) -> Command:
    """musubi-tuner's Python with ``arguments``, in the environment that every stage has."""
    path = facts.source_path
    # Cards are counted as nvidia-smi does, by which the memory tier was chosen; CUDA's own way
    # is the fastest first. Whatever order the shell names, CUDA_VISIBLE_DEVICES=1 so means the
    # card that was looked at.
    environment = [("CUDA_DEVICE_ORDER", "PCI_BUS_ID")]
    if path:
        environment.append(("PYTHONPATH", path))
    if offline:
        # The weights stage has brought all that is needed. Online, the tokenizers' cache would
        # be moved on from the commit that the run asked for.
        environment.append(("HF_HUB_OFFLINE", "1"))
    return Command(
        (facts.python, *arguments),
        set_env=tuple(environment),
        unset_env=("PYTHONHOME",) if path else ("PYTHONHOME", "PYTHONPATH"),
    )


class MusubiEngine:
    """musubi-tuner in an environment of its own."""

    name = "musubi"
    cache_identity = "musubi"
    own_options: frozenset[str] = frozenset()

    def problems(self, config: RunConfig) -> Iterator[str]:
        return rules.problems(config)

    def plan_problems(
        self, job: Job, machine: Machine | None, *, steps: int, clips: bool
    ) -> Iterator[str]:
        return rules.plan_problems(job.config, job.memory, steps=steps, clips=clips)

    def plan_notices(self, job: Job, *, steps: int) -> Iterator[str]:
        return rules.plan_notices(job.config, steps=steps)

    def locate(self, config: RunConfig, cwd: Path) -> EngineFacts:
        return located(config, cwd)

    def examine(
        self,
        facts: EngineFacts,
        config: RunConfig,
        memory: MemoryConfig,
        machine: Machine | None,
        without: str,
        *,
        trains: bool,
    ) -> EngineFacts:
        if machine is None:
            return replace(facts, cannot_compile=without)
        mode = config.training.compile
        wanted = mode == "always" or (mode == "auto" and not memory.blocks_to_swap)
        if facts.missing or not wanted or not trains:
            return facts
        return replace(facts, cannot_compile=cannot_compile(python_command(facts)))

    def check(self, job: Job, machine: Machine | None, *, trains: bool) -> str:
        command = python_command(job.engine)
        versions = check_environment(job.config, command, machine, trains=trains)
        return f"{job.engine.version}, {versions}"

    def full_version(self, facts: EngineFacts) -> str:
        return facts.version

    def memory_plan(
        self, config: RunConfig, machine: Machine | None, without: str
    ) -> tuple[MemoryConfig, str | None]:
        if config.memory.name != "auto":
            return config.memory, None
        tier, note = largest_tier(machine, without)
        return filled(config.memory, tier), note

    def weights(self, config: RunConfig, root: Path) -> WeightFacts:
        return hub_weights(config, root)

    def cache_latents(self, job: Job, dataset_toml: str) -> Command:
        arguments = latents_arguments(job, dataset_toml)
        return python_command(job.engine, *_corrected("hv_1_5_cache_latents"), *arguments)

    def cache_text(self, job: Job, dataset_toml: str) -> Command:
        arguments = text_arguments(job, dataset_toml)
        if job.memory.fp8_text_encoder:
            arguments.append("--fp8_vl")
        script = _corrected("hv_1_5_cache_text_encoder_outputs")
        return python_command(job.engine, *script, *arguments)

    def train(self, job: Job, options: Mapping[str, Any]) -> Command:
        config = job.config
        given = ["--config_file", "train.toml"]
        if config.engine.arguments == "command_line":
            given = command_line(options)
        # accelerate takes what it is not told from the user's own config, and then every card it
        # sees and any torch.compile backend named there: so it is told all of it.
        return python_command(
            job.engine,
            *("corrected.py", "-m", "accelerate.commands.launch"),
            *("--config_file", "accelerate.yaml"),
            *("--num_processes", "1"),
            *("--num_machines", "1"),
            *("--num_cpu_threads_per_process", "1"),
            *("--dynamo_backend", "no"),
            *("--mixed_precision", config.precision.mixed_precision),
            *_corrected("hv_1_5_train_network"),
            *given,
            *config.engine.extra_args,
            # An upload that was asked for must reach the hub.
            offline=not any(a.startswith("--huggingface") for a in config.engine.extra_args),
        )

    def evaluate(self, job: Job, dataset_toml: str) -> Command | None:
        return None

    def files(self, job: Job, options: Mapping[str, Any]) -> dict[str, str]:
        files = {"accelerate.yaml": _ACCELERATE, "corrected.py": _CORRECTED}
        if job.config.engine.arguments == "file":
            files = {"train.toml": render(options), **files}
        return files

    def failure(self, log: Path) -> str:
        return failure(log)

    def compiles(self, job: Job, machine: Machine | None) -> tuple[bool, str | None]:
        config, memory = job.config, job.memory
        if config.training.compile == "none":
            return False, None
        why = _cannot_compile(job, machine)
        if config.training.compile == "auto":
            # With block swap every linear layer stays uncompiled: on an H100 the steps took as long
            # as without, after half a minute more at the start (docs/musubi-proof.md).
            if why is None and memory.blocks_to_swap and machine is not None:
                why = "it gained nothing with block swap (memory.blocks_to_swap)"
                # 25 frames took 16.8 GB in fp8, compiled: 1.7 s a step; in bf16 with swap 3.1 s.
                if config.precision.fp8_base and machine.memory_gb > 20:
                    why += "; in fp8 25 frames fit without: memory.blocks_to_swap=0 would compile"
            return why is None, why and f"torch.compile is off: {why}."
        if why is not None and machine is not None:
            raise UserError(
                f"training.compile=always: {why}. training.compile=auto goes on without it."
            )
        return True, None


def _cannot_compile(job: Job, machine: Machine | None) -> str | None:
    config = job.config
    if machine is None:
        return job.engine.cannot_compile or NO_CARD
    if machine.capability < (7, 0):
        return f"Triton needs compute capability 7.0 ({machine.name} has less)"
    if config.precision.mixed_precision == "bf16" and machine.capability < (8, 0):
        return f"below compute capability 8.0 ({machine.name}) it leaves out bf16"
    if config.precision.fp8_base and machine.capability < (8, 9):
        return f"below compute capability 8.9 ({machine.name}) it cannot compile fp8"
    return job.engine.cannot_compile
