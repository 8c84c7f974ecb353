"""Each saved LoRA has its file for ComfyUI, whether its trainer goes on, fails or is ended."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from cache_process import context_of
from conftest import TOP
from in_process import handlers_kept
from other_processes import pictures
from safetensors import safe_open
from safetensors.torch import save

from runner.core.command import Command
from runner.core.console import Console
from runner.core.errors import StageError
from runner.core.process import Stopped, raise_on_signals
from runner.hub.local_files import LocalFile
from runner.pipeline.checkpoints import COMFYUI, CheckpointConversion, converted_name, parse_name
from runner.pipeline.run_metadata import run_metadata
from runner.pipeline.stages.convert import CONVERT
from runner.pipeline.stages.train import TRAIN

if TYPE_CHECKING:
    from runner.pipeline.context import Context

# A trainer: writes whole files of a LoRA slowly, as one that writes into the file itself, and waits
# for what the runner makes of them.
TRAINER = """
import time
from pathlib import Path

folder = Path("checkpoints")
folder.mkdir(exist_ok=True)
data = Path("lora.bytes").read_bytes()

def write(name, whole=True):
    with (folder / name).open("wb", buffering=0) as file:
        for start in range(0, len(data), len(data) // 4 + 1):
            file.write(data[start : start + len(data) // 4 + 1])
            time.sleep(0.2)
            if not whole:
                return

def wait_for(name, there=True):
    deadline = time.monotonic() + 120
    while bool(list((folder / "comfyui").glob(f"*{name}.safetensors"))) != there:
        time.sleep(0.05)
        assert time.monotonic() < deadline, name
"""


def lora() -> bytes:
    leaves = {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "alpha": ()}
    name = "lora_unet_double_blocks_0_img_attn_q"
    tensors = {f"{name}.{leaf}": torch.ones(shape) for leaf, shape in leaves.items()}
    return save(tensors, {"ss_steps": "10"})


def training(tmp_path: Path, code: str, *overrides: str) -> tuple[Context, io.StringIO]:
    """A run that has come to its training, by a trainer of this code."""
    out = io.StringIO()
    media = pictures(tmp_path / "media", 1)
    console = Console.for_stream(out)
    context = context_of(tmp_path / "out", media, "engine=diffusers", *overrides, console=console)
    (context.run_dir / "lora.bytes").write_bytes(lora())
    trainer = Command((sys.executable, "-S", "-c", TRAINER + code))
    stages = (
        replace(stage, commands=(trainer, *stage.commands[1:])) if stage.name == "train" else stage
        for stage in context.plan.stages
    )
    context.plan = replace(context.plan, stages=tuple(stages))
    return context, out


def converted(run: Path) -> list[str]:
    """The files for ComfyUI, by what comes after the run's date, time and name."""
    label = f"{run.parent.name}-{run.name}"
    names = sorted(file.name for file in (run / COMFYUI).glob("*"))
    assert all(name.startswith(label) and name.endswith(".safetensors") for name in names), names
    return [name.removeprefix(label).removesuffix(".safetensors") for name in names]


# While the trainer goes on, what it saved is converted, each once, and goes when the trainer
# deletes it; the last one is the file at the root, under one more name.
def test_each_is_converted_while_training_goes_on(tmp_path: Path) -> None:
    context, out = training(
        tmp_path,
        """
write("lora-step00000500.safetensors")
wait_for("-step000500")
write("lora-000003.safetensors")
wait_for("-epoch000003")
(folder / "lora-step00000500.safetensors").unlink()
wait_for("-step000500", there=False)
(folder / "lora-state").mkdir()
write("lora.safetensors")
""",
    )
    run = context.run_dir
    TRAIN.run(context)
    assert converted(run) == ["-epoch000003"]
    CONVERT.run(context)
    assert converted(run) == ["-epoch000003", ""]
    (last,) = (run / COMFYUI).glob(f"*{run.name}.safetensors")
    assert last.samefile(run / "lora_comfyui.safetensors")
    said = (run / "logs/checkpoints.log").read_text().splitlines()
    assert [line.partition(" ")[0] for line in said] == [
        "checkpoints/lora-step00000500.safetensors",
        "checkpoints/lora-000003.safetensors",
    ]
    assert "note: " not in out.getvalue()
    with safe_open(
        run / COMFYUI / f"{converted_name(run, 'lora-000003.safetensors')}.safetensors", "pt"
    ) as file:
        assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in file.keys()  # noqa: SIM118


# A trainer that fails leaves what it saved converted, the finished one too; what it was writing is
# said to be cut, and is no file for ComfyUI.
def test_a_failed_run(tmp_path: Path) -> None:
    context, out = training(
        tmp_path,
        """
write("lora-000001.safetensors")
write("lora.safetensors")
write("lora-step00000009.safetensors", whole=False)
raise SystemExit("it broke")
""",
    )
    with pytest.raises(StageError, match="it broke"):
        TRAIN.run(context)
    assert converted(context.run_dir) == ["-epoch000001", ""]
    assert (
        "checkpoints/lora-step00000009.safetensors was cut, and is not converted" in out.getvalue()
    )


# A run that is ended converts what was saved before it is over.
def test_an_ended_run(tmp_path: Path) -> None:
    context, _ = training(
        tmp_path, 'write("lora-000001.safetensors")\nPath("saved").touch()\ntime.sleep(600)'
    )

    def end() -> None:
        while not (context.run_dir / "saved").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with handlers_kept():
        raise_on_signals()
        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(Stopped):
            TRAIN.run(context)
        thread.join()
    assert converted(context.run_dir) == ["-epoch000001"]


# What can't be converted is one line, and neither fails the training nor stops the others.
def test_one_that_cant_be_converted(tmp_path: Path) -> None:
    context, out = training(
        tmp_path,
        """
write("lora-000001.safetensors")
data = data.replace(b"img_attn_q", b"img_attn_?")
data = data.replace(b"lora_down", b"lora_soft")
write("lora-000002.safetensors")
write("lora.safetensors")
""",
    )
    TRAIN.run(context)
    assert converted(context.run_dir) == ["-epoch000001"]
    (notice,) = (line for line in out.getvalue().splitlines() if "note: " in line)
    assert "checkpoints/lora-000002.safetensors was not converted for ComfyUI: " in notice
    assert "has ['alpha', 'lora_soft.weight', 'lora_up.weight']" in notice


# With the conversion skipped, no checkpoint is converted either.
def test_skipped(tmp_path: Path) -> None:
    code = 'write("lora-000001.safetensors")\nwrite("lora.safetensors")\ntime.sleep(5)'
    context, _ = training(tmp_path, code, "stages.skip=[convert]")
    TRAIN.run(context)
    assert not (context.run_dir / COMFYUI).exists()


# The process that converts has the lowest priority, one thread, and a file that is being written
# is not begun.
def test_it_leaves_the_trainer_its_time(tmp_path: Path) -> None:
    watch = (
        "import atexit, os, sys\n"
        "def say():\n"
        "    torch = sys.modules.get('torch')\n"
        "    print('nice', os.nice(0), 'threads', torch and torch.get_num_threads())\n"
        "atexit.register(say)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(watch)
    (tmp_path / "checkpoints").mkdir()
    conversion = CheckpointConversion(tmp_path, sys.executable, f"{tmp_path}{os.pathsep}{TOP}")
    file = tmp_path / "checkpoints/lora-000001.safetensors"
    data = lora()
    file.write_bytes(data[:-4])
    for _ in range(12):
        conversion.tick()
        time.sleep(0.25)
    assert not (tmp_path / "logs").exists()
    file.write_bytes(data)
    assert conversion.finish(with_last=False) == []
    assert "nice 19 threads 1\n" in (tmp_path / "logs/checkpoints.log").read_text()


# Names sort, name the run, and are read from the trainers' names alone.
def test_names(tmp_path: Path) -> None:
    run = tmp_path / "2026-11-30" / "12-00-00-cat"
    names = ["lora-step00000500", "lora-000012", "lora"]
    assert [converted_name(run, f"{name}.safetensors") for name in names] == [
        f"2026-11-30-12-00-00-cat{end}" for end in ("-step000500", "-epoch000012", "")
    ]
    for name in ("lora_comfyui.safetensors", "lora-state", "lora-1.safetensors", ".lora.x.tmp"):
        assert parse_name(name) is None


# What a run's folder says is in the metadata: trigger words, the size of what was trained, the run,
# and the base model where weights.json lists the very file; nothing is guessed.
def test_metadata(tmp_path: Path) -> None:
    run = tmp_path / "2026-11-30" / "12-00-00-cat"
    run.mkdir(parents=True)
    trained = {"ss_sd_model_name": "model.safetensors", "modelspec.resolution": "1280x720"}
    assert run_metadata(run, trained) == {
        **trained,
        "ss_base_model_version": "hunyuan_video_1_5",
        "ss_run_id": "2026-11-30-12-00-00-cat",
    }
    (run / "config.yaml").write_text(
        "dataset: {trigger_word: ohwx, resolution: [544, 960], sources: []}\n"
        "model: {repository: tencent/HunyuanVideo-1.5, transformer: t/file.safetensors}\n"
        "tracking: {uri: 'http://a:${oc.env:NO_SUCH_VARIABLE}@host'}\n"
    )
    (run / "run.json").write_text(json.dumps({"mlflow_run_id": "abc"}))
    other = {"repository": "other/repository", "file": "t/file.safetensors", "sha256": "0"}
    (run / "weights.json").write_text(json.dumps({"files": [other]}))
    described = {
        "ss_sd_model_name": "model.safetensors",
        "modelspec.resolution": "544x960",
        "modelspec.trigger_phrase": "ohwx",
        "ss_base_model_version": "hunyuan_video_1_5",
        "ss_run_id": "abc",
    }
    assert run_metadata(run, trained) == described
    file = {**other, "repository": "tencent/HunyuanVideo-1.5", "sha256": "1234"}
    (run / "weights.json").write_text(json.dumps({"files": [other, file]}))
    assert run_metadata(run, trained) == {
        **described,
        "ss_sd_model_name": "tencent/HunyuanVideo-1.5/t/file.safetensors",
        "ss_new_sd_model_hash": "1234",
    }
    # A file of this computer is of no repository, whatever the config names.
    local = LocalFile("transformer", Path("/home/me/t/file.safetensors"), 1, "5678").record()
    vae = LocalFile("vae", Path("/home/me/vae.safetensors"), 1, "9").record()
    (run / "weights.json").write_text(json.dumps({"files": [other, local, vae]}))
    assert run_metadata(run, trained) == {
        **described,
        "ss_sd_model_name": "local:file.safetensors",
        "ss_new_sd_model_hash": "5678",
    }
    (run / "config.yaml").write_text(
        "dataset:\n  trigger_word: ohwx\n  resolution: [544, 960]\n  sources:\n"
        "  - {resolution: [960, 960], trigger_word: null}\n  - {trigger_word: zwx}\n"
        "  - {trigger_word: a dog, resolution: [2000, 2000], regularisation: true}\n"
    )
    several = run_metadata(run, {})
    assert several["modelspec.trigger_phrase"] == "ohwx, zwx"
    assert several["modelspec.resolution"] == "960x960"
    # A trainer that says what it trained on knows better.
    trained = run_metadata(run, {"modelspec.resolution": "544x960"})
    assert trained["modelspec.resolution"] == "544x960"
    # So does one that was told 1280x720, which is also what it says when it was told nothing.
    (run / "train.toml").write_text('metadata_reso = "1280,720"\n')
    trained = run_metadata(run, {"modelspec.resolution": "1280x720"})
    assert trained["modelspec.resolution"] == "1280x720"
