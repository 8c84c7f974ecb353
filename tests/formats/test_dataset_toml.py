"""dataset.toml: what is written is what is read, and mistakes are one clear line."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from runner.core.errors import UserError
from runner.formats.dataset_toml import DatasetTable, parse, render
from runner.formats.frames import FrameExtraction

IMAGES = DatasetTable("image", "cache/images", (544, 960), jsonl="images.jsonl", num_repeats=3)
VIDEOS = DatasetTable(
    "video",
    "cache/videos",
    (960, 544),
    directory='ä "clips" [1] #x = y',
    caption_extension=".caption",
    batch_size=2,
    enable_bucket=False,
    bucket_no_upscale=True,
    extraction=FrameExtraction((1, 13), "slide", 4, 2, 65, 30.0),
)


# Reading gives back what was written, whatever characters a path holds.
def test_round_trip() -> None:
    entries = [IMAGES, VIDEOS, replace(VIDEOS, cache_directory="c", extraction=FrameExtraction())]
    assert parse(render(entries)) == entries
    assert render(entries) == render(list(entries))


# Each table is complete, so that no default of musubi's can step in; source_fps alone has no value
# that means "none", and is a float.
def test_tables_are_complete() -> None:
    image, video = tomllib.loads(render([IMAGES, VIDEOS]))["datasets"]
    shared = {
        *("cache_directory", "resolution", "caption_extension", "batch_size", "num_repeats"),
        *("enable_bucket", "bucket_no_upscale"),
    }
    assert set(image) == shared | {"image_jsonl_file"}
    own = {"target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames"}
    assert set(video) == shared | own | {"video_directory", "source_fps"}
    whole = replace(VIDEOS, extraction=FrameExtraction(source_fps=30))
    assert "source_fps = 30.0" in render([whole])
    assert "source_fps" not in render([replace(VIDEOS, extraction=FrameExtraction())])


# A hand-written file means what it means to musubi: [general] fills in, buckets are off by default.
def test_general_and_musubi_defaults() -> None:
    (first, second) = parse(
        """
        [general]
        resolution = 512
        num_repeats = 2
        [[datasets]]
        image_directory = "pictures"
        num_repeats = 5
        [[datasets]]
        video_jsonl_file = "v.jsonl"
        cache_directory = "c"
        target_frames = [1, 25]
        """
    )
    assert first == DatasetTable(
        "image", "pictures", (512, 512), directory="pictures", num_repeats=5, enable_bucket=False
    )
    assert second.extraction == FrameExtraction((1, 25))
    assert (second.num_repeats, second.resolution, second.enable_bucket) == (2, (512, 512), False)
    assert parse('[[datasets]]\nimage_directory = "x"')[0].resolution == (960, 544)


# Every mistake is named with its table and key.
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "not valid TOML"),
        ("a = 1", "unknown key 'a'"),
        ("[general]\nsize = 1", r"\[general\]: unknown key 'size'"),
        ('[[datasets]]\nimage_directory = "x"\nframes = 1', "dataset 1: unknown key 'frames'"),
        ('[[datasets]]\nimage_directory = "x"\nmax_frames = 9', "unknown key 'max_frames'"),
        ('[[datasets]]\ncache_directory = "x"', "exactly one of"),
        ('[[datasets]]\nimage_directory = "x"\nvideo_directory = "y"', "exactly one of"),
        ('[[datasets]]\nimage_jsonl_file = "x"', "cache_directory is missing"),
        ('[[datasets]]\nimage_jsonl_file = "x"\nimage_directory = "y"', "exactly one of"),
        ('[[datasets]]\nimage_directory = "x"\nbatch_size = 0', "batch_size = 0 is wrong"),
        ('[[datasets]]\nimage_directory = "x"\nbatch_size = true', "whole number"),
        ('[[datasets]]\nimage_directory = "x"\nresolution = [1]', "width, height"),
        ('[[datasets]]\nvideo_directory = "x"\nsource_fps = 30', "such as 30.0"),
        ('[[datasets]]\nvideo_directory = "x"\nframe_extraction = "mid"', "head, chunk"),
        ('[[datasets]]\nimage_directory = "x"\n' * 2, "another dataset's"),
        ("datasets = 3", r"\[\[datasets\]\]"),
        ("datasets = [3]", r"\[\[datasets\]\]"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


# Entries that musubi would refuse are not written.
def test_wrong_entries_are_not_written() -> None:
    with pytest.raises(UserError, match="exactly one of"):
        render([replace(IMAGES, directory="x")])
    with pytest.raises(UserError, match="another dataset's"):
        render([IMAGES, IMAGES])
    with pytest.raises(UserError, match="to video only"):
        render([replace(IMAGES, extraction=FrameExtraction())])
