"""The cache files' names and contents: what musubi-tuner reads, and never half of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runner.core.errors import StageError, UserError
from runner.formats import cache_files
from runner.formats.frames import Crop

LATENTS = torch.linspace(-1, 1, 32 * 2 * 3 * 4).reshape(32, 2, 3, 4)


# musubi finds size, crop and item by position in the name, so names are pinned to the letter.
def test_names() -> None:
    assert (
        cache_files.image_latents_name("a cat", (200, 1200)) == "a cat_0200x1200_hv15.safetensors"
    )
    assert (
        cache_files.video_latents_name("clip_0", Crop(7, 25), (128, 96))
        == "clip_0_00007-025_0128x0096_hv15.safetensors"
    )
    assert cache_files.text_name("clip_0") == "clip_0_hv15_te.safetensors"


# Whatever an item is called, its cache's name gives back item, crop and size.
@pytest.mark.parametrize(
    "item", ["a", "a_b", "a.b", "x_0100x0200", "[x] é (1)", "_", "1_00000-013_2", "hv15"]
)
@pytest.mark.parametrize("size", [(96, 64), (12345, 16)])
def test_parse_is_the_inverse(item: str, size: tuple[int, int]) -> None:
    crop = Crop(123456, 1001)
    assert cache_files.parse_latents_name(cache_files.image_latents_name(item, size)) == (
        item,
        None,
        size,
    )
    assert cache_files.parse_latents_name(cache_files.video_latents_name(item, crop, size)) == (
        item,
        crop,
        size,
    )


# Other files in a cache folder are never taken for latents.
@pytest.mark.parametrize(
    "name",
    [
        "a_hv15_te.safetensors",
        "a_0096x0064_hv.safetensors",
        "a_hv15.safetensors",
        "_0096x0064_hv15.safetensors",
        ".a_0096x0064_hv15.safetensors.7.tmp",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not the name of a latent cache"):
        cache_files.parse_latents_name(name)


# What is written comes back: values, types and metadata.
def test_round_trip(tmp_path: Path) -> None:
    siglip = torch.randn(5, 6).half()
    condition = torch.randn(33, 2, 3, 4)
    path = tmp_path / "new folder" / "l.safetensors"
    cache_files.write_latents(
        path,
        LATENTS.to(torch.bfloat16),
        size=(64, 48),
        frame_count=5,
        latents_image=condition,
        siglip=siglip,
    )
    found = cache_files.read_latents(path)
    assert found.latents.dtype == torch.bfloat16
    assert torch.equal(found.latents, LATENTS.to(torch.bfloat16))
    assert found.latents_image is not None and torch.equal(found.latents_image, condition)
    assert found.siglip is not None and torch.equal(found.siglip, siglip)
    assert found.metadata["frame_count"] == "5"

    cache_files.write_text(path, torch.ones(3, 4), torch.zeros(0, 7), caption='é "x" 文')
    text = cache_files.read_text(path)
    assert text.caption == 'é "x" 文'
    assert text.vl_embed.shape == (3, 4)
    assert text.byt5_embed.shape == (0, 7)


# Equal encodings are equal files, so a store can tell them by their bytes. (safetensors alone
# writes the five metadata keys in an order that changes from call to call.)
def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    contents = set()
    for index in range(6):
        path = tmp_path / f"{index}.safetensors"
        cache_files.write_latents(path, LATENTS, size=(64, 48), frame_count=5)
        contents.add(path.read_bytes())
    assert len(contents) == 1


# The header of a file is filled up to a multiple of 8 bytes, whatever its words take, so that the
# numbers behind it lie where a reader that maps the file may take them as they are.
def test_numbers_are_aligned(tmp_path: Path) -> None:
    lengths = set()
    for count in range(8):
        path = tmp_path / cache_files.text_name(f"{count}")
        cache_files.write_text(path, torch.ones(3, 4), torch.zeros(0, 7), caption="é" + "x" * count)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        lengths.add(len(content[8 : 8 + length].rstrip(b" ")) % 8)
        assert cache_files.read_text(path).caption == "é" + "x" * count
    assert lengths == set(range(8))


# A write that fails leaves the old file whole and no other, and what is being written is never
# under a name that training would pick up.
def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / cache_files.image_latents_name("a", (64, 48))
    cache_files.write_latents(path, LATENTS, size=(64, 48), frame_count=None)
    before = path.read_bytes()
    picked_up: list[str] = []

    def full_disk(descriptor: int) -> None:
        picked_up.extend(found.name for found in tmp_path.glob("*_hv15*.safetensors"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        cache_files.write_latents(path, LATENTS + 1, size=(64, 48), frame_count=None)
    assert picked_up == [path.name]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Values that are not numbers would spoil every training step they take part in.
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_are_refused(tmp_path: Path, value: float) -> None:
    spoilt = LATENTS.clone()
    spoilt[3, 1, 2, 0] = value
    with pytest.raises(StageError, match=r"a_hv15\.safetensors: latents_2x3x4_float32"):
        cache_files.write_latents(
            tmp_path / "a_hv15.safetensors", spoilt, size=(64, 48), frame_count=None
        )
    assert list(tmp_path.iterdir()) == []


# A file that is missing, cut short or of another kind is named in one line.
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing, cut, other = (tmp_path / name for name in ("missing", "cut", "other"))
    cache_files.write_text(other, torch.ones(3, 4), torch.zeros(0, 7), caption="")
    cut.write_bytes(other.read_bytes()[:-9])
    for path, reason in ((missing, "no such"), (cut, "damaged"), (other, "has no latents")):
        with pytest.raises(UserError, match=reason) as raised:
            cache_files.read_latents(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


# The plan imports the formats on every start, so they load nothing heavy.
def test_import_is_light() -> None:
    heavy = "{'torch', 'numpy', 'safetensors'}"
    code = f"import sys, runner.formats.cache_files; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
