"""Frames and crops. Equality with musubi itself is in test_musubi_dataset.py."""

from __future__ import annotations

import pytest

from runner.config.dataset_schema import FRAME_EXTRACTIONS
from runner.core.errors import UserError
from runner.formats.frames import (
    Crop,
    FrameExtraction,
    choose,
    crops,
    kept_frames,
)


# Without a rate every frame is kept; a faster clip loses frames; a slower one keeps all, once.
def test_frames_are_dropped_to_24_a_second() -> None:
    assert kept_frames(5, None) == [0, 1, 2, 3, 4]
    assert len(kept_frames(60, 60.0)) == 24
    assert len(kept_frames(48, 48.0)) == 24
    assert kept_frames(6, 12.0) == [0, 1, 2, 3, 4, 5]
    assert kept_frames(0, 30.0) == []


# No crop reaches beyond its clip, and its length is 4N+1, whatever is asked.
def test_crops_lie_inside_the_clip() -> None:
    for mode in FRAME_EXTRACTIONS:
        for count in (0, 1, 4, 5, 30, 131):
            for targets in ((1,), (13, 14), (5, 200)):
                asked = FrameExtraction(targets, mode, stride=3, sample=4)
                for crop in crops(count, asked):
                    assert 0 <= crop.position <= crop.position + crop.frames <= count
                    assert crop.frames % 4 == 1


# Each mode does what its name says.
def test_modes() -> None:
    def cut(mode: str, count: int = 20, **options: int) -> list[tuple[int, int]]:
        found = crops(count, FrameExtraction((5, 9), mode, **options))
        return [(crop.position, crop.frames) for crop in found]

    assert cut("head") == [(0, 5), (0, 9)]
    assert cut("chunk") == [(0, 5), (5, 5), (10, 5), (15, 5), (0, 9), (9, 9)]
    assert cut("slide", 11, stride=2) == [(0, 5), (2, 5), (4, 5), (6, 5), (0, 9), (2, 9)]
    assert cut("uniform", sample=3) == [(0, 5), (7, 5), (15, 5), (0, 9), (5, 9), (11, 9)]
    assert cut("full") == [(0, 17)]
    assert cut("full", 200) == [(0, 129)]


# A crop that would be cut twice is listed once, as it is one cache file.
def test_crops_are_unique() -> None:
    assert crops(6, FrameExtraction((5,), "uniform", sample=7)) == [Crop(0, 5), Crop(1, 5)]
    assert crops(20, FrameExtraction((6, 5, 5))) == [Crop(0, 5)]


# A clip shorter than every target gives nothing, rather than an error or a short crop.
def test_short_clips_give_no_crop() -> None:
    assert crops(24, FrameExtraction((25,))) == []


# musubi stops reading a slow clip too early for its longest target; crops must not promise it.
def test_head_of_a_slow_clip_is_cut_as_musubi_reads_it() -> None:
    slow = FrameExtraction((13, 25), "head", source_fps=12.0)
    assert crops(100, slow) == [Crop(0, 13)]
    assert sum(choose(slow)) == 13


# Decoding ends where no crop can need more frames, and only where the mode has such an end.
def test_choosing_ends() -> None:
    assert list(choose(FrameExtraction((13, 25)))) == [True] * 25
    assert sum(choose(FrameExtraction(mode="full", max_frames=33, source_fps=60.0))) == 33
    chunk = choose(FrameExtraction((5,), "chunk"))
    assert all(next(chunk) for _ in range(1000))


# A way to cut clips that is unknown is named.
def test_unknown_extraction_is_named() -> None:
    with pytest.raises(UserError, match=r"'middle' is unknown.*head"):
        crops(9, FrameExtraction(mode="middle"))
