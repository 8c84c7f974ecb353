"""The engine musubi-tuner, run in an environment of its own.

Written for v0.3.4 (commit 30c658c). Its scripts are run as modules, so it makes no difference
whether the package is installed or used from a checkout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from runner.config.schema import MemoryConfig, RunConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.core.process import last_error
from runner.engines.base import (
    NO_GPU,
    EngineInstall,
    Gpu,
    IdleOption,
    Job,
    latents_arguments,
    text_arguments,
)
from runner.engines.compiling import reason_against
from runner.engines.failures import Failed, explained
from runner.engines.memory import filled, largest_tier, occupied, tier_notice
from runner.engines.musubi import option_paths, rules
from runner.engines.musubi.check import cannot_compile, check_environment
from runner.engines.musubi.failure import trainer_lines
from runner.engines.musubi.location import located
from runner.engines.musubi.original import command_line
from runner.engines.musubi.weights import model_weights
from runner.formats.cache_arguments import for_script
from runner.formats.train_toml import render
from runner.formats.trainer_options import LATENTS, TEXT, TRAIN, check_table
from runner.hub.weights import LocatedWeights

# Written into the run's folder, where every command runs, so that commands can be repeated by hand.
# accelerate reads the first instead of the user's own default file, which could request several
# GPUs; every module is run through the second.
_FILES = ("accelerate.yaml", "corrected.py")


@cache
def _package_file(name: str) -> str:
    return (files("runner.engines.musubi") / name).read_text(encoding="utf-8")


def _corrected(script: str, *arguments: str) -> tuple[str, ...]:
    return ("corrected.py", *arguments, "-m", f"musubi_tuner.{script}")


def python_command(
    install: EngineInstall, *arguments: str, offline: bool = True, compiles: bool = False
) -> Command:
    """Return a command that runs musubi-tuner's Python with the variables that all stages need.

    Args:
        install: the install to use.
        arguments: arguments for Python.
        offline: forbid access to the Hugging Face Hub.
        compiles: whether it uses torch.compile.
    """
    path = install.source_path
    # Number GPUs by PCI bus, as nvidia-smi does, so that CUDA_VISIBLE_DEVICES=1 means the GPU that
    # the memory tier was chosen for. CUDA's default is fastest first.
    environment = [("CUDA_DEVICE_ORDER", "PCI_BUS_ID")]
    if path:
        environment.append(("PYTHONPATH", path))
    if offline:
        # The weights stage has fetched all that is needed. Online, the tokenizers could be
        # updated to another commit than the one requested.
        environment.append(("HF_HUB_OFFLINE", "1"))
    if compiles:
        # Where inductor mixes reductions it has lost gradients, with other networks than
        # musubi-tuner's so far (docs/development/compiled-gradients.md). It costs no time.
        environment.append(("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0"))
    return Command(
        (install.python, *arguments),
        set_env=tuple(environment),
        unset_env=("PYTHONHOME",) if path else ("PYTHONHOME", "PYTHONPATH"),
    )


class MusubiEngine:
    """musubi-tuner in an environment of its own."""

    name = "musubi"
    own_encoding: str | None = None
    own_options: frozenset[str] = frozenset()

    def first_defaults(self, config: RunConfig) -> Mapping[str, Any]:
        # Before version 0.2.0 i2v was always trained unscaled, and the option did nothing.
        training = config.training
        unscaled = config.task.name == "i2v" or training.i2v_unscaled_condition
        return {"training.i2v_unscaled_condition": unscaled}

    def problems(self, config: RunConfig) -> Iterator[str]:
        return rules.problems(config)

    def plan_problems(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        return rules.plan_problems(job.config, job.memory, steps=steps, clips=clips)

    def plan_notices(self, job: Job, gpu: Gpu | None, *, steps: int, clips: bool) -> Iterator[str]:
        return rules.plan_notices(job.config, steps=steps, clips=clips)

    def idle_options(self, config: RunConfig, *, only_clips: bool) -> Iterator[IdleOption]:
        return rules.idle_options(config, only_clips=only_clips)

    def resolve_paths(self, config: RunConfig, cwd: Path) -> RunConfig:
        return option_paths.resolve_paths(config, cwd)

    def locate(self, config: RunConfig, cwd: Path) -> EngineInstall:
        return located(config, cwd)

    def examine(
        self,
        install: EngineInstall,
        config: RunConfig,
        memory: MemoryConfig,
        gpu: Gpu | None,
        no_gpu_reason: str,
        *,
        trains: bool,
    ) -> EngineInstall:
        if gpu is None:
            return replace(install, cannot_compile=no_gpu_reason)
        install = replace(install, missing=install.missing or occupied(config, gpu))
        mode = config.training.compile
        wanted = mode == "always" or (mode == "auto" and not memory.blocks_to_swap)
        if install.missing or not wanted or not trains:
            return install
        return replace(install, cannot_compile=cannot_compile(python_command(install)))

    def check(self, job: Job, gpu: Gpu | None, *, trains: bool) -> str:
        command = python_command(job.engine)
        versions = check_environment(job.config, command, gpu, trains=trains)
        return f"{job.engine.version}, {versions}"

    def full_version(self, install: EngineInstall) -> str:
        return install.version

    def memory_plan(
        self, config: RunConfig, gpu: Gpu | None, no_gpu_reason: str
    ) -> tuple[MemoryConfig, str | None]:
        if config.memory.name != "auto":
            return config.memory, tier_notice(config.memory, gpu)
        tier, note = largest_tier(gpu, no_gpu_reason, config.memory.limit_gb)
        return filled(config.memory, tier), note

    def weights(self, config: RunConfig, root: Path) -> LocatedWeights:
        return model_weights(config, root)

    def cache_latents(self, job: Job, dataset_toml: str) -> Command:
        arguments = latents_arguments(job, dataset_toml)
        arguments += for_script(LATENTS, job.config.engine.cache_args)
        return python_command(job.engine, *_corrected("hv_1_5_cache_latents"), *arguments)

    def cache_text(self, job: Job, dataset_toml: str) -> Command:
        arguments = text_arguments(job, dataset_toml)
        if job.memory.fp8_text_encoder:
            arguments.append("--fp8_vl")
        arguments += for_script(TEXT, job.config.engine.cache_args)
        script = _corrected("hv_1_5_cache_text_encoder_outputs")
        return python_command(job.engine, *script, *arguments)

    def train(self, job: Job, options: Mapping[str, Any]) -> Command:
        config = job.config
        # musubi-tuner does not validate the values of a file.
        for problem in check_table(TRAIN, options):
            raise UserError(f"train.toml: {problem}")
        option_arguments = ["--config_file", "train.toml"]
        if config.engine.arguments == "command_line":
            option_arguments = command_line(options)
        scaled = config.task.name == "i2v" and not config.training.i2v_unscaled_condition
        # For every argument that is left out accelerate reads the user's own config, which may
        # request all GPUs or a torch.compile backend: so none is left out.
        return python_command(
            job.engine,
            *("corrected.py", "-m", "accelerate.commands.launch"),
            *("--config_file", "accelerate.yaml"),
            *("--num_processes", "1"),
            *("--num_machines", "1"),
            *("--num_cpu_threads_per_process", "1"),
            *("--dynamo_backend", "no"),
            *("--mixed_precision", config.precision.mixed_precision),
            *_corrected("hv_1_5_train_network", *(["--scale_condition"] if scaled else [])),
            *option_arguments,
            *config.engine.extra_args,
            # A requested upload must reach the Hub.
            offline=not any(a.startswith("--huggingface") for a in config.engine.extra_args),
            compiles=bool(options.get("compile")),
        )

    def evaluate(self, job: Job, dataset_toml: str) -> Command | None:
        return None

    def files(self, job: Job, options: Mapping[str, Any]) -> dict[str, str]:
        own = {name: _package_file(name) for name in _FILES}
        if job.config.engine.arguments == "file":
            return {"train.toml": render(options), **own}
        return own

    def failure(self, log: Path, code: int, stage: str, job: Job) -> str:
        lines = trainer_lines(log)
        if lines is None:
            return last_error(log)
        return explained(Failed(lines, code, stage, job, saves_memory=True))

    def compiles(self, job: Job, gpu: Gpu | None) -> tuple[bool, str | None]:
        config, memory = job.config, job.memory
        if config.training.compile == "none":
            return False, None
        why = _cannot_compile(job, gpu)
        if config.training.compile == "auto":
            # With block swap every linear layer stays uncompiled: on an H100 compiling cost half a
            # minute at the start and made no step faster (docs/development/musubi-proof.md).
            if why is None and memory.blocks_to_swap and gpu is not None:
                why = "it gained nothing with block swap (memory.blocks_to_swap)"
                # 25 frames took 16.8 GB in fp8, compiled: 1.7 s a step; in bf16 with swap 3.1 s.
                if config.precision.fp8_base and gpu.memory_gb > 20:
                    why += "; in fp8 25 frames fit without: memory.blocks_to_swap=0 would compile"
            return why is None, why and f"torch.compile is off: {why}."
        if why is not None and gpu is not None:
            raise UserError(
                f"training.compile=always: {why}. training.compile=auto goes on without it."
            )
        return True, None


def _cannot_compile(job: Job, gpu: Gpu | None) -> str | None:
    if gpu is None:
        return job.engine.cannot_compile or NO_GPU
    return reason_against(job.config, gpu, job.engine.cannot_compile)
