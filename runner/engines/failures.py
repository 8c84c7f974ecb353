"""What a failed process of any engine means: its own error, and which options to change; pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass

from runner.config.schema import RunConfig
from runner.core.process import TRACEBACK, best_line, shortened
from runner.engines.base import Job
from runner.engines.memory import TIERS

# The part of an error that is reported beside what to do. Out of memory, PyTorch says in 600
# characters what it has allocated and reserved.
_REASON_LENGTH = 160
# Blocks that musubi-tuner leaves on the GPU at least.
_BLOCKS_KEPT = 3


@dataclass(frozen=True)
class Failed:
    """A process that failed.

    Attributes:
        lines: the last lines of its log.
        code: its exit code; negative for the signal that ended it.
        stage: the name of its stage.
        job: the run that it is of.
        saves_memory: whether the engine has block swap and fp8.
    """

    lines: list[str]
    code: int
    stage: str
    job: Job
    saves_memory: bool


def explained(failed: Failed) -> str:
    """Explain in one line why a process failed, and which options to change if that is known."""
    best = best_line(failed.lines)
    if failed.code == -signal.SIGKILL:
        best = "the program was ended by SIGKILL"
    # "backend='inductor' raised:" has its cause in the next line.
    said = sorted((best, *_after_traceback(failed.lines)), key=lambda line: line.endswith(":"))
    for line in said:
        for pattern, remedies in _KINDS:
            if pattern.search(line):
                reason = _sentences(line.strip(), _REASON_LENGTH).rstrip(" .:")
                return f"{reason}. {_what_helps(remedies(failed))}"
    return best


def not_finite_advice(config: RunConfig) -> str:
    """Say which options to change after a loss that was not finite."""
    return _what_helps(_not_finite(config))


def _not_finite(config: RunConfig) -> list[str]:
    precision, rate = config.precision, config.optimizer.learning_rate
    helps = []
    if precision.mixed_precision == "fp16":
        helps.append("precision=bf16 instead of fp16")
    if precision.fp8_base:
        helps.append("precision=bf16 instead of fp8")
    helps.append(f"optimizer.learning_rate={rate / 5:g} instead of {rate:g}")
    if config.network.alpha > config.network.rank:
        helps.append(f"network.alpha={config.network.rank} instead of {config.network.alpha:g}")
    if not config.training.max_grad_norm:
        helps.append("training.max_grad_norm=1")
    if not config.scheduler.warmup_steps:
        helps.append("scheduler.warmup_steps=100")
    return helps


def _what_helps(helps: list[str]) -> str:
    return f"What helps, the most likely first: {', '.join(helps)}"


def _sentences(text: str, length: int) -> str:
    """Cut a text behind a sentence, if it is longer than ``length``."""
    if len(text) <= length:
        return text
    end = max(text.rfind(mark, 0, length) for mark in (". ", "; "))
    return text[:end] if end > 0 else shortened(text, length)


def _after_traceback(lines: list[str]) -> list[str]:
    """Return the lines of the last exception."""
    starts = [at for at, line in enumerate(lines) if line.endswith(TRACEBACK)]
    return [line for line in lines[starts[-1] + 1 :] if line[:1].strip()] if starts else []


def _gpu_memory(failed: Failed) -> list[str]:
    memory, dataset = failed.job.memory, failed.job.config.dataset
    helps = []
    if failed.stage == "latents":
        tile = memory.vae_tile or 1024
        helps += [f"memory.vae_tile={smaller}" for smaller in (256, 128) if smaller < tile][:1]
    elif failed.stage == "text":
        if failed.saves_memory and not memory.fp8_text_encoder:
            helps.append("memory.fp8_text_encoder=true")
        if (memory.text_batch_size or 4) > 1:
            helps.append("memory.text_batch_size=1")
    else:
        helps += _of_network(failed)
    if failed.stage != "text":
        if dataset.batch_size > 1 and failed.stage == "train":
            helps.append("dataset.batch_size=1")
        if max(dataset.target_frames, default=1) > 1:
            helps.append("smaller dataset.target_frames")
        helps.append("a lower dataset.resolution")
    if not failed.saves_memory and failed.stage != "latents":
        limit_gb = memory.limit_gb
        helps.insert(
            1 if failed.stage == "evaluate" else 0,
            "memory.limit_gb below what the GPU has"
            if limit_gb is None
            else f"memory.limit_gb={max(1.0, limit_gb - 1):g}",
        )
    return [*helps, "ending other programs on the GPU (nvidia-smi)"]


def _of_network(failed: Failed) -> list[str]:
    config, memory = failed.job.config, failed.job.memory
    if failed.stage != "train":
        return [f"stages.skip=[{failed.stage}]"]
    helps = []
    if memory.checkpointing == "none":
        helps.append("memory.checkpointing=full")
    if failed.saves_memory:
        names = [name for name, _ in TIERS]
        if memory.name in names[1:]:
            helps.append(f"memory={names[names.index(memory.name) - 1]}")
        elif (swapped := memory.blocks_to_swap or 0) < (most := config.model.blocks - _BLOCKS_KEPT):
            helps.append(f"memory.blocks_to_swap={min(most, swapped + 8)}")
        if not config.precision.fp8_base:
            helps.append("precision=fp8")
    if config.sampling.name != "none":
        helps.append("smaller sampling.width, sampling.height and sampling.frames")
    return helps


def _main_memory(failed: Failed) -> list[str]:
    memory, training = failed.job.memory, failed.job.config.training
    helps = []
    if failed.stage == "train" and failed.saves_memory:
        if memory.pinned:
            helps.append("memory.pinned=false")
        if memory.blocks_to_swap:
            helps.append(f"memory.blocks_to_swap={max(0, memory.blocks_to_swap - 8)}")
        if training.data_workers:
            helps.append("training.data_workers=0")
    return [*helps, "ending other programs, or more main memory or swap (for WSL2 in .wslconfig)"]


def _shared_memory(failed: Failed) -> list[str]:
    return ["training.data_workers=0", "a larger /dev/shm (--shm-size in Docker)"]


def _disk(failed: Failed) -> list[str]:
    helps = ["python -m runner.cache prune"]
    if failed.stage == "train":
        helps.append("training.keep_last=2")
    return [*helps, "output_dir=FOLDER on a larger disk"]


def _bitsandbytes(failed: Failed) -> list[str]:
    return ["optimizer=adamw, which needs no bitsandbytes", _install(failed)]


def _compiler(failed: Failed) -> list[str]:
    return ["training.compile=none"]


def _library(failed: Failed) -> list[str]:
    return [*_gpu_memory(failed), _install(failed)]


def _driver(failed: Failed) -> list[str]:
    return [_install(failed), "a newer driver (nvidia-smi shows which there is)"]


def _device(failed: Failed) -> list[str]:
    helps = ["nvidia-smi, which shows whether the GPU is well; if not, restart the computer"]
    if failed.stage == "train" and failed.job.config.training.compile != "none":
        helps.insert(0, "training.compile=none")
    return helps


def _install(failed: Failed) -> str:
    script = "scripts/install-musubi" if failed.saves_memory else "scripts/setup"
    return f"{script}, which takes the builds for this driver"


# What errors say, the particular before the general, and what to do about them.
_KINDS: tuple[tuple[re.Pattern[str], Callable[[Failed], list[str]]], ...] = (
    (re.compile(r"the loss was not finite"), lambda failed: _not_finite(failed.job.config)),
    (
        re.compile(
            r"CUDA out of memory|\bOutOfMemoryError|CUDA error: out of memory|"
            r"CU(BLAS|DNN)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
        ),
        _gpu_memory,
    ),
    (re.compile(r"insufficient shared memory|Bus error|unable to open shared"), _shared_memory),
    (
        re.compile(
            r"SIGKILL|DefaultCPUAllocator|std::bad_alloc|\bMemoryError|Cannot allocate memory|"
            r"os error 12\b|killed by signal: Killed"
        ),
        _main_memory,
    ),
    (re.compile(r"^the disk is full"), _disk),
    (
        re.compile(r"bitsandbytes|CUDA Setup failed|'NoneType' object has no attribute 'c\w*bit"),
        _bitsandbytes,
    ),
    (
        re.compile(
            r"InductorError|BackendCompilerFailed|[Tt]riton|ptxas|Failed to find C compiler|"
            r"OutOfResources|torch\._dynamo\.exc"
        ),
        _compiler,
    ),
    (
        re.compile(
            r"no kernel image|driver version is insufficient|CUDA driver initialization failed|"
            r"forward compatibility was attempted|version mismatch|invalid device function"
        ),
        _driver,
    ),
    (re.compile(r"CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|FIND was unable"), _library),
    (re.compile(r"CUDA error|ECC error|device-side assert|GPU is lost"), _device),
)
