"""What a failure of a stage is answered with: its own error, and the options that help there."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item

from runner.config.rules import value_of
from runner.core.process import shortened
from runner.engines.base import Gpu
from runner.engines.registry import engine_named

RAISED = "Traceback (most recent call last):\n  File x\n    f()\n"
# As PyTorch 2.11 says it.
MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
    "capacity of 23.64 GiB of which 812.19 MiB is free. Process 1 has 22.83 GiB memory in use. Of "
    "the allocated memory 21.97 GiB is allocated by PyTorch, and 414.52 MiB is reserved by PyTorch "
    "but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation "
    "for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
DISK = "OSError: [Errno 28] No space left on device: 'checkpoints/lora.safetensors'"
GPU = Gpu("a GPU", 24.0, (8, 9))


def answer(folder: Path, stage: str, said: str, *overrides: str, code: int = 1) -> str:
    """What is reported of a stage whose log ends so, on a GPU of 24 GB."""
    config = compose(*overrides)
    job = fake_facts(config, [fake_item("a.png")], gpu=GPU).job
    (folder / "log").write_text(said)
    return engine_named(config.engine.name).failure(folder / "log", code, stage, job)


OURS = "engine=diffusers"
CASES: list[tuple[str, str, tuple[str, ...], str, str]] = [
    ("latents", MEMORY, (), "memory.vae_tile=128, smaller dataset.target_frames", "block"),
    ("latents", MEMORY, ("memory=80gb",), "memory.vae_tile=256", "=128"),
    ("latents", MEMORY, ("memory.vae_tile=128",), "first: smaller dataset.target_frames", "tile"),
    ("text", MEMORY, ("memory=16gb",), "first: memory.text_batch_size=1", "fp8_text"),
    ("text", MEMORY, (), "first: memory.fp8_text_encoder=true, memory.text", "target_frames"),
    ("text", MEMORY, (OURS,), "the GPU has, memory.text_batch_size=1", "fp8_text"),
    ("train", MEMORY, (), "first: memory=16gb, precision=fp8", "batch_size"),
    ("train", MEMORY, ("memory=12gb",), "first: memory.blocks_to_swap=", "memory=12gb"),
    ("train", MEMORY, ("precision=fp8", "dataset.batch_size=2"), "dataset.batch_size=1", "=fp8"),
    ("train", MEMORY, (OURS,), "first: memory.limit_gb below what", "blocks_to_swap"),
    ("train", MEMORY, (OURS, "memory.limit_gb=8"), "first: memory.limit_gb=7, smaller", "musubi"),
    ("train", MEMORY, (OURS, "memory.checkpointing=none"), "memory.checkpointing=full", "="),
    ("train", MEMORY, ("sampling=prompts", "sampling.prompts=[a]"), "smaller sampling.width", "x"),
    ("evaluate", MEMORY, (OURS,), "first: stages.skip=[evaluate]", "precision"),
    ("train", "RuntimeError: CUDA error: out of memory", (), "memory=16gb", "nvidia-smi, "),
    ("train", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED", (), "memory=16gb", "driver"),
    ("train", "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED", (), "install-musubi", "x"),
    ("train", "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", (OURS,), "setup", "x"),
    ("train", "RuntimeError: CUDA error: an illegal memory access", (), "compile=none", "=16gb"),
    ("train", "RuntimeError: CUDA error: no kernel image is available", (), "install-musubi", "x"),
    (
        "train",
        "RuntimeError: DataLoader worker (pid 9) is killed by signal: Killed.",
        ("memory.blocks_to_swap=20", "memory.pinned=true"),
        "first: memory.pinned=false, memory.blocks_to_swap=12, training.data_workers=0",
        "nvidia",
    ),
    (
        "train",
        "RuntimeError: unable to open shared memory object",
        (),
        "training.data_workers=0",
        "k",
    ),
    ("train", DISK, (), "training.keep_last=2, output_dir=FOLDER", "Errno"),
    ("latents", DISK, (OURS,), "first: python -m runner.cache prune", "keep_last"),
    (
        "train",
        "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:\n"
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
        (),
        "training.compile=none",
        "nvidia",
    ),
    ("train", "triton.compiler.errors.CompilationError: at 5:3", (), "training.compile=none", "x"),
    ("train", "OSError: libbitsandbytes_cpu.so: cannot open", (), "optimizer=adamw", "compile"),
    (
        "train",
        "error: the loss was not finite for 5 steps",
        (OURS,),
        "learning_rate=2e-05 inst",
        "f",
    ),
]


# Each known failure is reported with what helps in that stage, with that engine and these options,
# and with nothing that is set so already or that the engine does not have.
@pytest.mark.parametrize(("stage", "said", "overrides", "helps", "never"), CASES)
def test_what_helps(
    tmp_path: Path, stage: str, said: str, overrides: tuple[str, ...], helps: str, never: str
) -> None:
    line = answer(tmp_path, stage, f"{RAISED}{said}\n", *overrides)
    reason, _, advice = line.partition(". What helps, the most likely first: ")
    assert helps in f"first: {advice}" and "\n" not in line
    if len(never) > 1:
        assert never not in advice
    assert len(reason) <= 160 and not reason.startswith("error")
    # Every option that it names exists.
    config: Any = compose(*overrides)
    for key in re.findall(r"\b[a-z]+\.[a-z_]+(?==)", advice):
        value_of(config, key)


# PyTorch's 600 characters end behind a sentence, not in the middle of one.
def test_a_long_reason_ends_with_a_sentence(tmp_path: Path) -> None:
    line = answer(tmp_path, "train", RAISED + MEMORY)
    reason = line.partition(". What helps")[0]
    assert MEMORY.startswith(f"{reason}. Process 1") and reason.endswith("812.19 MiB is free")
    assert shortened("some words and more", 12) == "some words ..."


# An exception that only says that another was raised is reported by that one, and answered so.
def test_the_cause_of_an_exception(tmp_path: Path) -> None:
    raised = f"{RAISED}torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:\n"
    line = answer(tmp_path, "train", f"{raised}RuntimeError: Failed to find C compiler. Please\n")
    assert line.startswith("RuntimeError: Failed to find C compiler. ")
    line = answer(tmp_path, "train", f"{raised}OutOfMemoryError: CUDA out of memory.\n")
    assert "memory=16gb" in line and "compile" not in line
    line = answer(tmp_path, "train", f"{raised}SomethingElse: unheard of\n")
    assert "raised:. " not in line and line.endswith("training.compile=none")


# A process that the system killed is short of main memory, whatever its log says last; accelerate
# reports such an end of its trainer in words.
def test_a_killed_process(tmp_path: Path) -> None:
    line = answer(tmp_path, "train", "step 3\n", OURS, code=-signal.SIGKILL)
    assert line.startswith("the program was ended by SIGKILL. What helps") and "step 3" not in line
    died = "subprocess.CalledProcessError: Command '[]' died with <Signals.SIGKILL: 9>.\n"
    line = answer(tmp_path, "train", f"step 3\n{RAISED}{died}")
    assert "when memory runs out. What helps" in line and "training.data_workers=0" in line


# An error of another kind stays as it is, whatever was printed before it.
def test_other_errors_stay(tmp_path: Path) -> None:
    said = f"warning: cuDNN error, CUDA out of memory\n{RAISED}ValueError: no such scheduler\n"
    assert answer(tmp_path, "train", said) == "ValueError: no such scheduler"
    assert answer(tmp_path, "train", "error: no such file\n", OURS) == "no such file"
