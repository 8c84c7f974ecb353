"""musubi-tuner's command for each stage; pure.

Written against v0.3.4 (commit 30c658c). Its package is run as modules, so that it makes no
difference whether it was installed or lies in a checkout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.engines.base import (
    NO_CARD,
    EngineFacts,
    Machine,
    latents_arguments,
    text_arguments,
)
from runner.engines.musubi.original import command_line
from runner.engines.musubi.packages import VERSION as VERSION
from runner.formats.train_toml import WeightPaths

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


class MusubiEngine:
    """musubi-tuner in an environment of its own."""

    def __init__(self, facts: EngineFacts) -> None:
        self.facts = facts

    def python(self, *arguments: str, offline: bool = True) -> Command:
        """musubi-tuner's Python with ``arguments``, in the environment that every stage has."""
        path = self.facts.source_path
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
            (self.facts.python, *arguments),
            set_env=tuple(environment),
            unset_env=("PYTHONHOME",) if path else ("PYTHONHOME", "PYTHONPATH"),
        )

    def cache_latents(
        self, config: RunConfig, weights: WeightPaths, memory: MemoryConfig, dataset_toml: str
    ) -> Command:
        arguments = latents_arguments(config, weights, memory, dataset_toml)
        return self.python(*_corrected("hv_1_5_cache_latents"), *arguments)

    def cache_text(
        self, config: RunConfig, weights: WeightPaths, memory: MemoryConfig, dataset_toml: str
    ) -> Command:
        arguments = text_arguments(weights, memory, dataset_toml)
        if memory.fp8_text_encoder:
            arguments.append("--fp8_vl")
        return self.python(*_corrected("hv_1_5_cache_text_encoder_outputs"), *arguments)

    def train(self, config: RunConfig, options: Mapping[str, Any]) -> Command:
        given = ["--config_file", "train.toml"]
        if config.engine.arguments == "command_line":
            given = command_line(options)
        # accelerate takes what it is not told from the user's own config, and then every card it
        # sees and any torch.compile backend named there: so it is told all of it.
        return self.python(
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

    def evaluate(self, config: RunConfig, dataset_toml: str) -> Command | None:
        return None

    def files(self, config: RunConfig) -> dict[str, str]:
        return {"accelerate.yaml": _ACCELERATE, "corrected.py": _CORRECTED}

    def compiles(
        self, config: RunConfig, memory: MemoryConfig, machine: Machine | None
    ) -> tuple[bool, str | None]:
        if config.training.compile == "none":
            return False, None
        why = self._cannot_compile(config, machine)
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

    def _cannot_compile(self, config: RunConfig, machine: Machine | None) -> str | None:
        if machine is None:
            return self.facts.cannot_compile or NO_CARD
        if machine.capability < (7, 0):
            return f"Triton needs compute capability 7.0 ({machine.name} has less)"
        if config.precision.mixed_precision == "bf16" and machine.capability < (8, 0):
            return f"below compute capability 8.0 ({machine.name}) it leaves out bf16"
        if config.precision.fp8_base and machine.capability < (8, 9):
            return f"below compute capability 8.9 ({machine.name}) it cannot compile fp8"
        return self.facts.cannot_compile
