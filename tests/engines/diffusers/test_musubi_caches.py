"""Cache files of musubi-tuner's own making: the embedded engine writes the same and trains on them.

The files are written by scripts/record-musubi-caches, whose text says when and how; with it
musubi-tuner's loader reads this project's files, beside its own in one batch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOP
from media_factory import make_clip, make_image

from runner.engines.diffusers import cache_latents, data, models, text_encoding
from runner.engines.diffusers.make_weights import make_weights
from runner.engines.diffusers.media_list import MediaToEncode
from runner.formats import cache_files
from runner.formats.dataset_toml import DatasetTable
from runner.formats.frames import FrameExtraction

RECORDED = TOP / "tests" / "fixtures" / "musubi_caches"
PICTURE = RECORDED / "picture_0100x0060_hv15.safetensors"
CLIP = RECORDED / "t2v_00000-005_0048x0032_hv15.safetensors"
CLIP_I2V = RECORDED / "i2v_00000-005_0048x0032_hv15.safetensors"
QUOTING, PLAIN = (RECORDED / f"{name}_hv15_te.safetensors" for name in ("quoting", "plain"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    make_weights(folder)
    return folder


def header(path: Path) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    """The type and shape of each tensor of a file, and its metadata."""
    content = path.read_bytes()
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = found.pop("__metadata__")
    return {key: (one["dtype"], one["shape"]) for key, one in found.items()}, metadata


# Networks of the types that musubi's scripts use give files that differ from musubi's in nothing
# but the numbers: name, keys, types, shapes and metadata, for a picture, a clip and one for i2v.
def test_latents_are_written_as_musubi_writes_them(weights: Path, tmp_path: Path) -> None:
    half = torch.float16
    vae = models.load_vae(weights / "vae", dtype=half)
    siglip = models.load_image_encoder(weights / "image_encoder", dtype=half)
    made = tmp_path / "cache"
    common: dict[str, Any] = {"cache_directory": str(made), "resolution": (48, 32)}
    pictures = DatasetTable(kind="image", **common)
    clips = DatasetTable(kind="video", extraction=FrameExtraction(target_frames=(5,)), **common)

    picture = MediaToEncode("picture", make_image(tmp_path / "picture.png", (100, 60)), "")
    cache_latents.cache_image(vae, pictures, picture)
    for name, encoder in (("t2v", None), ("i2v", siglip)):
        clip = make_clip(tmp_path / f"{name}.mkv", 5, size=(48, 32))
        cache_latents.cache_clip(vae, clips, MediaToEncode(name, clip, ""), encoder)

    recorded = sorted(path.name for path in (PICTURE, CLIP, CLIP_I2V))
    assert sorted(path.name for path in made.iterdir()) == recorded
    for name in recorded:
        assert header(made / name) == header(RECORDED / name)


# So do those of captions, with a quoted text and without; their lengths are the tokenizer's.
@pytest.mark.parametrize("path", [QUOTING, PLAIN])
def test_captions_are_written_as_musubi_writes_them(
    weights: Path, tmp_path: Path, path: Path
) -> None:
    caption = header(path)[1]["caption1"]
    qwen = models.load_text_encoder(weights / "text_encoder", dtype=torch.bfloat16)
    byt5 = models.load_byt5(weights / "byt5", dtype=torch.float16)
    (vl_embed,) = text_encoding.encode_captions(*qwen, [caption])
    glyphs = text_encoding.encode_glyphs(*byt5, caption)
    cache_files.write_text(tmp_path / path.name, vl_embed, glyphs, caption=caption)
    ours, theirs = header(tmp_path / path.name), header(path)
    assert ours[1] == theirs[1]
    assert [(key, kind) for key, (kind, _) in sorted(ours[0].items())] == [
        (key, kind) for key, (kind, _) in sorted(theirs[0].items())
    ]
    assert (len(glyphs) == 0) == (theirs[0].get("varlen_byt5_embed_float32") == ("F32", [0, 1472]))


# A training of the embedded engine takes musubi's files as its own, and refuses those of the other
# task as it refuses its own.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_musubi_files_are_trained_on(tmp_path: Path, task: str) -> None:
    latents = CLIP if task == "t2v" else CLIP_I2V
    folder = tmp_path / "cache"
    folder.mkdir()
    shutil.copy(latents, folder)
    shutil.copy(QUOTING, folder / cache_files.text_name(task))
    toml = tmp_path / "dataset.toml"
    toml.write_text(
        f"[[datasets]]\nvideo_directory = 'media'\ncache_directory = '{folder}'\n"
        "resolution = [48, 32]\ntarget_frames = [5]\n"
    )
    (dataset,) = data.scan(toml, task)
    example = data.load(dataset.examples[0])
    assert dataset.examples[0].shape == (32, 2, 2, 3)
    assert (example.latents.dtype, example.latents.shape) == (torch.float16, (32, 2, 2, 3))
    assert (example.text.dtype, example.text.shape) == (torch.bfloat16, (7, 64))
    assert (example.byt5.dtype, example.byt5.shape) == (torch.float16, (4, 32))
    if task == "i2v":
        assert example.condition is not None and example.vision is not None
        assert (example.condition.dtype, example.condition.shape) == (torch.float32, (33, 2, 2, 3))
        assert example.condition[-1, :, 0, 0].tolist() == [1, 0]
        assert (example.vision.dtype, example.vision.shape) == (torch.float16, (16, 32))
    else:
        assert example.condition is None and example.vision is None
