"""Our buckets, frames and pixels against what musubi-tuner itself made of the same media.

The fixture is written by scripts/record-musubi-dataset, whose text says when and how.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOP
from media_factory import frame_number, make_clip, pattern

from runner.data.decode import load_clip, resize_to_bucket
from runner.formats.bucket import bucket_size
from runner.formats.cache_files import image_latents_name, video_latents_name
from runner.formats.frames import FrameExtraction, choose, crops, kept_frames

RECORD: dict[str, Any] = json.loads((TOP / "tests/fixtures/musubi_dataset.json").read_text())


def _extraction(case: dict[str, Any]) -> FrameExtraction:
    return FrameExtraction(
        target_frames=tuple(case["target_frames"]),
        mode=case["mode"],
        stride=case["stride"],
        sample=case["sample"],
        max_frames=case["max_frames"],
        source_fps=case["source_fps"],
    )


@cache
def _same_resizers() -> bool:
    import cv2

    return (version("pillow"), cv2.__version__) == (RECORD["pillow"], RECORD["opencv"])


def _assert_pixels(array: np.ndarray, case: dict[str, Any]) -> None:
    flat = array.reshape(-1)
    some = flat[:: max(1, len(flat) // 7)][:7].astype(int)
    # Another version of Pillow or OpenCV may round otherwise; a wrong crop or filter shows anyway.
    assert np.abs(some - case["some"]).max() <= 3, case
    if _same_resizers():
        assert hashlib.sha256(array.tobytes()).hexdigest()[:16] == case["sha256"], case


# A picture gets the bucket, the cache file name and the very pixels that musubi gives it.
def test_images_are_resized_as_musubi_resizes_them() -> None:
    pictures = {tuple(case["size"]): pattern(tuple(case["size"])) for case in RECORD["images"]}
    seen: set[tuple[object, ...]] = set()
    for case in RECORD["images"]:
        size = tuple(case["size"])
        bucket = bucket_size(
            size,
            tuple(case["resolution"]),
            enable_bucket=case["enable_bucket"],
            bucket_no_upscale=case["bucket_no_upscale"],
        )
        assert list(bucket) == case["bucket"], case
        assert image_latents_name(f"i{size[0]}x{size[1]}", size) == case["file"]
        # Most flags lead to a bucket that another case has shown already.
        if (size, bucket, case["sha256"]) not in seen:
            _assert_pixels(resize_to_bucket(pictures[size], bucket), case)
            seen.add((size, bucket, case["sha256"]))


# A clip gets musubi's bucket and pixels, and the bucket flags change nothing for clips.
def test_clips_are_resized_as_musubi_resizes_them(tmp_path: Path) -> None:
    one = FrameExtraction(target_frames=(1,))
    clips: dict[tuple[int, int], Path] = {}
    for case in RECORD["clips"]:
        size, resolution = tuple(case["size"]), tuple(case["resolution"])
        name = f"c{size[0]}x{size[1]}"
        if size not in clips:
            pictures = [pattern(size, seed) for seed in range(2)]
            clips[size] = make_clip(tmp_path / f"{name}.mkv", pictures=pictures)
        bucket = bucket_size(size, resolution)
        assert list(bucket) == case["bucket"], case
        assert video_latents_name(name, crops(1, one)[0], bucket) == case["file"]
        if (case["enable_bucket"], case["bucket_no_upscale"]) == (False, True):
            _assert_pixels(load_clip(clips[size], one, resolution), case)


# The crops of a clip, their file names and the decoded frames in them are musubi's, for every
# extraction mode, frame rate and length.
@pytest.mark.parametrize("mode", ["head", "chunk", "slide", "uniform", "full"])
def test_crops_hold_the_frames_that_musubi_takes(mode: str) -> None:
    cases = [case for case in RECORD["extractions"] if case["mode"] == mode]
    assert len(cases) > 20
    for case in cases:
        extraction = _extraction(case)
        for length, expected in case["clips"].items():
            kept = kept_frames(int(length), extraction.source_fps)
            found = []
            for crop in crops(len(kept), extraction):
                name = video_latents_name(f"n{int(length):03d}", crop, (32, 32))
                found.append([name, kept[crop.position : crop.position + crop.frames]])
            found.sort()
            text = json.dumps(found, separators=(",", ":")).encode()
            assert [len(found), hashlib.sha256(text).hexdigest()[:10]] == expected, (case, length)
            if length == "50":
                assert [[name, n[0], n[-1]] for name, n in found][:6] == case["shown"]


# Decoding gives the crops the same frames, and stops before frames that no crop can need.
def test_decoded_frames_are_the_chosen_ones(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "n050.mkv", 50, size=(32, 32))
    tried = set()
    for case in RECORD["extractions"]:
        extraction = _extraction(case)
        flags = tuple(choice for _, choice in zip(range(50), choose(extraction), strict=False))
        if flags in tried:
            continue
        tried.add(flags)
        loaded = load_clip(clip, extraction, (32, 32))
        numbers = [frame_number(frame) for frame in loaded]
        assert numbers == [index for index, keep in enumerate(flags) if keep]
        kept = kept_frames(50, extraction.source_fps)
        assert numbers == kept[: len(numbers)]
        assert crops(len(numbers), extraction) == crops(len(kept), extraction)
    assert len(tried) > 20
