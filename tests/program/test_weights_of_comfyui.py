"""Dry runs with ComfyUI's folder of weights: what is found is shown, and used by both engines."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import Finished, run_program, tree
from in_process import composed, program_here
from other_processes import pictures
from sparse_weights import joined, published, write_sparse

from runner.core.console import Console
from runner.formats.published_layout import layout
from runner.pipeline import executor
from runner.pipeline.record import parameters

TRANSFORMER = "diffusion_models/hunyuanvideo1.5_720p_t2v_fp16.safetensors"
ENGINES = {
    "diffusers": ("engine=diffusers", "optimizer=adamw"),
    "musubi": ("engine=musubi", "precision=fp16"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a picture, an H100, and the weights as ComfyUI's users have them."""
    pictures(tmp_path / "media", 1)
    models = tmp_path / "Comfy UI" / "models"
    for name in (TRANSFORMER, TRANSFORMER.replace("t2v", "i2v")):
        write_sparse(models / name, joined(), "F16")
    published("vae", models / "vae" / "hunyuanvideo15_vae_fp16.safetensors")
    for part in ("text_encoder", "byt5"):
        published(part, models / "text_encoders" / f"{part}.safetensors", whole=True)
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 9.0'\n")
    tool.chmod(0o755)
    return tmp_path


def arguments(*more: str) -> tuple[str, ...]:
    return ("tracking=none", "dataset.path=media", "dry_run=true", *more)


def environment(place: Path) -> dict[str, str]:
    return {
        "PATH": f"{place / 'bin'}:/usr/bin:/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(place),
    }


@pytest.fixture
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest's own signal handlers stay."""
    monkeypatch.setattr(executor, "raise_on_signals", lambda: None)


def dry_run(place: Path, *more: str) -> Finished:
    return program_here(*arguments(*more), cwd=place, env=environment(place))


# Every file that the folder has is in the plan, and in what the engine is given; no repository of
# the model is named, and nothing is written.
@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_of_comfyui(place: Path, engine: str) -> None:
    before = tree(place)
    done = dry_run(place, *ENGINES[engine], "model.folder=~/Comfy UI/models")
    assert done.code == 0, done.err
    models = place / "Comfy UI" / "models"
    assert f"  weights    transformer: {models / TRANSFORMER}\n" in done.out
    assert f"\n             VAE: {models}/vae/hunyuanvideo15_vae_fp16.safetensors\n" in done.out
    assert f'dit = "{models / TRANSFORMER}"' in done.out
    assert (
        "transformer, VAE, text encoder, ByT5 encoder on this computer; 5 files of Qwen/Qwen-Image,"
        " google/byt5-small, 5 to fetch, 4 to hash"
    ) in done.out
    assert "tencent" not in done.out and "Comfy-Org" not in done.out
    assert tree(place) == before


# The config, the parameters and the notices of the run have what was found, and no repository.
@pytest.mark.usefixtures("no_handlers")
def test_the_runs_records(place: Path) -> None:
    overrides = arguments(*ENGINES["musubi"], f"model.folder={place / 'Comfy UI' / 'models'}")
    console = Console.for_stream(io.StringIO())
    prepared = executor.prepare(composed(*overrides), console, place)
    model = prepared.composed.resolved["model"]
    assert model["transformer"] == str(place / "Comfy UI" / "models" / TRANSFORMER)
    assert model == asdict(prepared.inputs.config.model)
    logged = parameters(prepared.composed, prepared.inputs)
    assert logged["model.transformer"] == model["transformer"]
    assert not any("tencent" in str(v) for v in (*model.values(), *logged.values()))
    write_sparse(place / "Comfy UI/models/q.safetensors", layout("text_encoder"), "F8_E4M3")
    published("image_encoder", place / "Comfy UI/models/text_encoders/text_encoder.safetensors")
    plan = executor.prepare(composed(*overrides), console, place).plan
    assert "model.folder: q.safetensors is stored in fp8: not used." in plan.notices


# An option of a part wins over the folder, and a path of it is taken as typed, from the program's
# own command line too.
def test_an_option_of_a_part(place: Path) -> None:
    mine = published("vae", place / "my, [vae] = 'x'.safetensors")
    done = run_program(
        *arguments(*ENGINES["diffusers"], "model.folder=./Comfy UI/models"),
        "model.vae=./my, [vae] = 'x'.safetensors",
        cwd=place,
        env=environment(place),
    )
    assert done.code == 0, done.err
    assert f"\n             VAE: {mine}\n" in done.out


# What is wrong is one line.
@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            "model.folder=~/ComfyUI/models",
            "model.folder=~/ComfyUI/models: there is no such folder.",
        ),
        (
            "model.folder=~/Comfy UI/model",
            "model.folder=~/Comfy UI/model: there is no such folder. Did you mean models?",
        ),
        (
            "model.vae=~/Comfy UI/models/vae/hunyuanvideo_vae_fp16.safetensors",
            "model.vae=~/Comfy UI/models/vae/hunyuanvideo_vae_fp16.safetensors: there is no such "
            "file. Did you mean hunyuanvideo15_vae_fp16.safetensors?",
        ),
        (
            "model.vae=~/Comfy UI/models/text_encoders/byt5.safetensors",
            "{place}/Comfy UI/models/text_encoders/byt5.safetensors is the ByT5 encoder, not the "
            "VAE: model.vae must be vae/diffusion_pytorch_model.safetensors of "
            "tencent/HunyuanVideo-1.5.",
        ),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_wrong_is_one_line(place: Path, engine: str, given: str, line: str) -> None:
    done = dry_run(place, *ENGINES[engine], given)
    assert (done.code, done.err) == (2, f"error: {line.format(place=place)}\n")


# In bf16 musubi-tuner would refuse the fp16 weights after all caching.
def test_fp16_weights_of_the_folder(place: Path) -> None:
    done = dry_run(place, "engine=musubi", "model.folder=~/Comfy UI/models")
    assert done.code == 2
    assert done.err.endswith(
        "holds fp16 weights, which can't be trained in precision=bf16: take precision=fp16, or a "
        "bf16 file.\n"
    )
