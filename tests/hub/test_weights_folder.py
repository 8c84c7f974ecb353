"""A folder of weights: files are what their headers say, and names decide only between equals."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import compose
from sparse_weights import DTYPES, joined, published, write_sparse

from runner.core.errors import UserError
from runner.formats.published_check import PART_NAMES
from runner.formats.published_layout import layout
from runner.hub.weights_folder import FoundWeights, find_weights

MODEL = compose("model=hunyuan15_720p", "task=t2v").model
WANTED = {part: getattr(MODEL, part) for part in PART_NAMES}
NAMES = {
    "transformer": "a.safetensors", "vae": "b.safetensors", "text_encoder": "c.safetensors",
    "byt5": "deep/er/d.safetensors", "image_encoder": "e.safetensors",
}  # fmt: skip


def find(folder: Path, *parts: str, task: str = "t2v") -> FoundWeights:
    return find_weights(folder, {part: WANTED[part] for part in parts or WANTED}, task)


def transformer(folder: Path, name: str) -> Path:
    return write_sparse(folder / name, joined(), "F16")


def refused(folder: Path, *parts: str) -> str:
    with pytest.raises(UserError) as error:
        find(folder, *parts)
    return str(error.value)


# Each part is found by its tensors, whatever it is called, through links too and each file once;
# LoRAs, other models and other files are not noticed.
def test_parts_are_found_by_their_headers(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    files = {part: published(part, folder / name) for part, name in NAMES.items()}
    write_sparse(folder / "sdxl.safetensors", {"input_blocks.0.weight": (10**9,)}, "F16")
    write_sparse(folder / "lora.safetensors", {"x.lora_up.weight": (64, 64)}, "F16")
    (folder / "model.ckpt").write_bytes(b"pickle")
    assert find(folder) == FoundWeights(files, ())
    (folder / "again").symlink_to(folder)
    (folder / "z.safetensors").symlink_to(files["vae"])
    assert find(folder) == FoundWeights(files, ())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked").symlink_to(folder)
    assert find(elsewhere).files["byt5"] == elsewhere / "linked" / NAMES["byt5"]


# Of transformers, which have the same tensors, the name says which is the task's and the size's,
# as a file's or as a folder's; what is distilled is not taken.
def test_names_decide_between_transformers(tmp_path: Path) -> None:
    for size in ("480p", "720p"):
        for task in ("t2v", "i2v"):
            transformer(tmp_path, f"hy1.5_{size}_{task}_fp16.safetensors")
    transformer(tmp_path, "hy1.5_720p_T2V_cfg_distilled.safetensors")
    for task in ("t2v", "i2v"):
        found = find(tmp_path, "transformer", task=task)
        assert found == FoundWeights(
            {"transformer": tmp_path / f"hy1.5_720p_{task}_fp16.safetensors"}, ()
        )
    folders = tmp_path / "hub"
    for name in ("480p_t2v", "720p_t2v", "720p_i2v", "720p_t2v_distilled"):
        transformer(folders, f"{name}/diffusion_pytorch_model.safetensors")
    chosen = find(folders, "transformer").files["transformer"]
    assert chosen.parent.name == "720p_t2v"


# A name that says no task or size is taken where no other says the right ones.
def test_a_name_that_says_nothing(tmp_path: Path) -> None:
    plain = transformer(tmp_path, "mine.safetensors")
    assert find(tmp_path, "transformer").files == {"transformer": plain}
    right = transformer(tmp_path, "hy_720p_t2v.safetensors")
    assert find(tmp_path, "transformer").files == {"transformer": right}


# Files that nothing tells apart are named, with the option that chooses.
def test_several_files_are_refused(tmp_path: Path) -> None:
    transformer(tmp_path, "720p_t2v_bf16.safetensors")
    transformer(tmp_path, "720p_t2v_fp16.safetensors")
    assert refused(tmp_path, "transformer") == (
        f"model.folder={tmp_path} has 2 files for the transformer: 720p_t2v_bf16.safetensors, "
        "720p_t2v_fp16.safetensors. Choose one, for example model.transformer="
        f"{tmp_path}/720p_t2v_bf16.safetensors."
    )
    qwen = tmp_path / "qwen"
    published("text_encoder", qwen / "abliterated.safetensors")
    published("text_encoder", qwen / "other.safetensors")
    assert "2 files for the text encoder: abliterated.safetensors" in refused(qwen, "text_encoder")
    usual = published("text_encoder", qwen / "qwen_2.5_vl_7b.safetensors")
    assert find(qwen, "text_encoder").files == {"text_encoder": usual}


# Parts that are not in the folder are named, and so is each file that is nearly one, with what is
# against it; nothing is said of a file where another is taken.
def test_what_is_not_taken_is_said(tmp_path: Path) -> None:
    vae = published("vae", tmp_path / "vae.safetensors")
    write_sparse(tmp_path / "qwen_fp8.safetensors", layout("text_encoder"), "F8_E4M3")
    transformer(tmp_path, "hy_720p_i2v.safetensors")
    transformer(tmp_path, "hy_480p_t2v.safetensors")
    cut = published("byt5", tmp_path / "cut.safetensors")
    with cut.open("r+b") as handle:
        handle.truncate(300_000_000)
    found = find(tmp_path, "transformer", "vae", "text_encoder")
    assert found.files == {"vae": vae}
    assert found.notices == (
        "model.folder: not in it, so from the hub: the transformer, the text encoder.",
        "model.folder: hy_480p_t2v.safetensors is for 480p by its name: not used.",
        "model.folder: hy_720p_i2v.safetensors is for i2v by its name: not used.",
        "model.folder: qwen_fp8.safetensors is stored in fp8: not used.",
        "model.folder: cut.safetensors cannot be read: not used.",
    )
    published("text_encoder", tmp_path / "qwen.safetensors")
    assert not any("fp8" in notice for notice in find(tmp_path, "text_encoder").notices)


# A folder with nothing of the model is the wrong one.
def test_a_folder_without_the_model(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"model.folder={tmp_path} has no file of this model among 0 large .safetensors files."
    )
    write_sparse(tmp_path / "q.safetensors", layout("text_encoder"), "F8_E4M3")
    assert refused(tmp_path, "text_encoder") == (
        f"model.folder={tmp_path} has no file of this model among 1 large .safetensors file: "
        "q.safetensors is stored in fp8."
    )


# No part is so small that it would be passed over as too small.
@pytest.mark.parametrize("part", DTYPES)
def test_no_part_is_too_small(part: str, tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "w.safetensors", layout(part), "F8_E4M3")
    assert f"{file.name} is stored in fp8" in refused(tmp_path, part)
