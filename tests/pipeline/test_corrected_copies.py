"""Corrected copies in the cache: one for each correction, none where none is needed, and nothing
that was encoded before a correction serves after it."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_process import context_of, fake_musubi, with_musubi
from conftest import compose, fake_facts, fake_item, plan_of
from media_factory import make_clip, make_image
from odd_media import CORNERS, TIMES, corners_of, number_of, odd_clip

from runner.data.corrections.model import Display
from runner.data.decode import load_clip, load_image
from runner.formats.frames import FrameExtraction
from runner.pipeline.stages.dataset import DATASET

TINY = ("engine=diffusers", "model=tiny", "optimizer=adamw", "memory=cpu")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A plain picture and clip, and one of each that must be corrected."""
    from PIL import Image

    folder = tmp_path / "media"
    make_image(folder / "plain.png")
    make_clip(folder / "plain.mp4", 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    corners = Image.fromarray(CORNERS.repeat(24, 0).repeat(32, 1))
    corners.save(folder / "turned.png", exif=exif)
    odd_clip(folder / "fast.mp4", TIMES["60"], orientation=6)
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text(file.stem)
    return folder


def as_zip(folder: Path) -> Path:
    """A zip of a folder, outside it."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as out:
        for file in folder.iterdir():
            out.write(file, file.name)
    return archive


# What a run reads is corrected, the same from a folder and a zip; the plain files are the user's
# own. A second run finds all copies made.
@pytest.mark.parametrize("packed", [False, True])
def test_runs_read_corrected_copies(packed: bool, media: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fake_musubi(out / "musubi")
    path = as_zip(media) if packed else media
    overrides = (*with_musubi(out), "dataset.target_frames=[1,5]")
    context = context_of(out, path, *overrides)
    DATASET.run(context)
    files = {
        item.media.name: context.run_dir / "dataset" / "media" / item.media_name
        for item in context.inputs.selection.items
    }
    for name in ("plain.png", "plain.mp4"):
        assert files[name].read_bytes() == (media / name).read_bytes()
    image = load_image(files["turned.png"])
    assert image.shape == (64, 48, 3)
    assert corners_of(image) == CORNERS[::-1].transpose(1, 0, 2).reshape(4, 3).tolist()
    clip = load_clip(files["fast.mp4"], FrameExtraction(mode="full"), (480, 640))
    assert [number_of(frame) for frame in clip] == [1, 3, 6, 8, 11]
    assert clip.shape[1] > clip.shape[2]
    shutil.rmtree(context.run_dir)
    again = context_of(out, path, *overrides)
    assert not again.plan.stage("dataset").missing


# A medium that needs no correction has the keys that it always had: nobody encodes again.
def test_plain_media_keep_their_keys() -> None:
    (picture, clip) = entries([fake_item("a.jpg"), fake_item("b.mp4")])
    assert (
        set(picture)
        == set(clip)
        == {
            "media",
            "bucket",
            "frames",
            "source_fps",
            "vae",
            "vae_tile",
            "task",
            "image_encoder",
            "decode",
        }
    )


def entries(items: list[Any], *overrides: str, target: str = "13") -> list[dict[str, Any]]:
    """The cache inputs of all latents, as a plan has them."""
    config = compose(*TINY, f"dataset.target_frames=[{target}]", *overrides)
    stage = plan_of(config, fake_facts(config, items)).stage("latents")
    return [dict(entry.cache_inputs) for entry in stage.entries]


# What a correction depends on is in the keys of latents, and what it does not is not: the length of
# the copy differs with the targets, the crop's pixels do not.
def test_corrections_are_in_the_keys() -> None:
    hidden = fake_item("a.png", mode="RGBA", display=Display(transparent=True))
    fast = fake_item("b.mp4", frames=200, fps=60.0)
    plain = entries([fake_item("a.png", mode="RGBA"), fake_item("b.mp4", frames=200)])
    corrected = entries([hidden, fast])
    assert all(one != other for one, other in zip(plain, corrected, strict=True))
    black = entries([hidden, fast], "dataset.background=black")
    assert (black[0] == corrected[0], black[1] == corrected[1]) == (False, True)
    rate = entries([hidden, fast], "dataset.fps=12")
    assert (rate[0] == corrected[0], rate[1] == corrected[1]) == (True, False)
    assert entries([hidden, fast], "dataset.fps=native")[1] == plain[1]
    longer, shorter = entries([fast], target="13,25"), entries([fast])
    assert len(longer) == 2
    assert shorter[0] in longer


# A longer copy is another copy: it has frames that the shorter one lacks.
def test_copies_differ_with_their_frames() -> None:
    fast = fake_item("b.mp4", frames=200, fps=60.0)
    keys = set()
    for target in ("13", "25", "25"):
        config = compose(*TINY, f"dataset.target_frames=[{target}]")
        (entry,) = plan_of(config, fake_facts(config, [fast])).stage("dataset").entries
        keys.add(entry.full_key)
    assert len(keys) == 2


# The plan says how many are corrected, and how much of the disk their copies can take.
def test_the_plan_says_the_disk() -> None:
    config = compose(*TINY, "dataset.target_frames=[25]")
    inputs = fake_facts(config, [fake_item("a.jpg"), fake_item("b.mp4", frames=200, fps=60.0)])
    summary = plan_of(config, inputs).stage("dataset").summary
    assert summary == "1 picture, 1 clip, 1 to correct (at most 69.1 MB of disk)"
    assert np.prod((1280, 720, 3, 25)) == 69_120_000
