"""musubi-tuner's command for each stage; pure.

Written against v0.3.4 (commit 30c658c). Its package is run as modules, so that it makes no
difference whether it was installed or lies in a checkout.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
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

# Written into the run's folder, where every command runs, so that they can be repeated by hand.
# accelerate reads the first instead of the user's own default file, which could ask for several
# cards, and every module is run through the second.
_FILES = ("accelerate.yaml", "corrected.py")


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
        folder = files("runner.engines.musubi")
        return {name: (folder / name).read_text(encoding="utf-8") for name in _FILES}

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
