"""The convert stage: a process of its own, whose failures are one line, and its log."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from cache_process import context_of
from conftest import compose, fake_facts, fake_item, plan_of, run_program
from other_processes import pictures

from runner.core.console import Console
from runner.core.errors import StageError
from runner.core.text import readable
from runner.engines.base import Gpu
from runner.pipeline.context import Context
from runner.pipeline.stages.convert import CONVERT


def converting(tmp_path: Path) -> Context:
    """A run that has come to its conversion."""
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    context.run_dir.mkdir(parents=True, exist_ok=True)
    return context


# A LoRA that can't be converted is reported in one line, which the stage's log has too.
@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "can't be read as a LoRA file: No such file"), (b"no tensors", "can't be read as a")],
)
def test_a_failure_is_one_line(tmp_path: Path, content: bytes | None, why: str) -> None:
    context = converting(tmp_path)
    if content is not None:
        (context.run_dir / "lora.safetensors").write_bytes(content)
    with pytest.raises(StageError) as caught:
        CONVERT.run(context)
    log = context.run_dir / "logs/convert.log"
    message = str(caught.value)
    assert message.startswith(f"lora.safetensors {why}") and "\n" not in message
    assert message.endswith(f" (exit code 2; log: {log})")
    assert log.read_text() == f"error: {message.removesuffix(f' (exit code 2; log: {log})')}\n"
    assert not (context.run_dir / "lora_comfyui.safetensors").exists()


# A place that can't be written to is reported as a failure, with the file.
def test_a_place_that_cant_be_written_to(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    leaves = {"lora_down.weight": (1, 2), "lora_up.weight": (2, 1), "alpha": ()}
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.{leaf}": torch.ones(s) for leaf, s in leaves.items()}, tmp_path / "a")
    (tmp_path / "b").mkdir()
    done = run_program("a", "b", cwd=tmp_path, module="runner.stages.convert")
    assert (done.code, done.out, done.err) == (
        1,
        "",
        "error: b can't be written (Is a directory)\n",
    )


# What its process starts with before it needs torch is small: no engine, no stage, no Hydra.
def test_its_start_is_light() -> None:
    code = (
        "import sys, runner.stages.convert\n"
        "heavy = {'torch', 'numpy', 'omegaconf', 'hydra', 'mlflow', 'runner.pipeline.stages'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def plan_notices(*overrides: str) -> list[str]:
    config = compose("dataset.path=media", *overrides)
    items, gpu = [fake_item(f"{n}.png") for n in range(4)], Gpu("H100", 80.0, (9, 0))
    plan = plan_of(config, fake_facts(config, items, gpu=gpu))
    return [notice for notice in plan.notices if "q, k and v" in notice]


# How large the files of a LoKr get is said before, for those modules that are trained and for all
# files that are kept: q, k and v of 54 blocks and two streams, 2048 wide, in two bytes.
@pytest.mark.parametrize(
    ("overrides", "each", "total"),
    [
        (["training.epochs=10"], 54 * 6 * 2048**2 * 2, 10),
        (["training.save_precision=fp32", "training.epochs=1"], 54 * 6 * 2048**2 * 4, 1),
        (["network.exclude=['.*txt_attn.*']", "training.keep_last=2"], 54 * 3 * 2048**2 * 2, 3),
        (["network.exclude=['.*_(q|k)']", "training.max_steps=8"], 54 * 6 * 2048**2 * 2, 2),
        (["training.save_every_epochs=5", "training.save_every_steps=20"], 54 * 6 * 2048**2 * 2, 4),
    ],
)
def test_the_size_of_a_lokr_is_said(overrides: list[str], each: int, total: int) -> None:
    (notice,) = plan_notices("network=lokr", *overrides)
    assert f"{readable(each)} for each file for ComfyUI" in notice
    files = f", {readable(each * total)} for the {total} of this run"
    assert (files in notice) == (total > 1), notice


# Other networks don't grow, nor does a LoKr without q, k and v, or of the tiny model.
@pytest.mark.parametrize(
    "overrides",
    [
        ["network=lora"],
        ["network=lokr", "network.exclude=['.*attn_(q|k|v)']"],
        ["network=lokr", "model=tiny", "engine=diffusers"],
    ],
)
def test_what_does_not_grow(overrides: list[str]) -> None:
    assert plan_notices(*overrides) == []


# One of several files that can't be converted does not keep the others from it; it decides the exit
# code.
def test_several_files(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    leaves = {"lora_down.weight": (1, 2), "lora_up.weight": (2, 1), "alpha": ()}
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.{leaf}": torch.ones(s) for leaf, s in leaves.items()}, tmp_path / "good")
    save_file({f"{name}.alpha": torch.ones(())}, tmp_path / "bad")
    files = ("bad", "out/1", "good", "out/2", "none", "out/3")
    done = run_program(*files, cwd=tmp_path, module="runner.stages.convert")
    assert (done.code, done.out) == (2, "good -> out/2: 3 tensors\n")
    first, second = done.err.splitlines()
    assert first.startswith(f"error: bad: '{name}' has ['alpha'], but a module has ")
    assert second.startswith("error: none can't be read as a LoRA file: ")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["2"]
    done = run_program("good", cwd=tmp_path, module="runner.stages.convert")
    assert done.code == 2
    assert "the files are pairs" in done.err
