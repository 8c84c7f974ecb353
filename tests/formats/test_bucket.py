"""Buckets: sizes and choice. Equality with musubi itself is in test_musubi_dataset.py."""

from __future__ import annotations

import pytest

from runner.core.errors import UserError
from runner.formats.bucket import bucket_size, bucket_sizes


# Every bucket is a multiple of 16 both ways, has its mirror image, and no more pixels than asked.
@pytest.mark.parametrize("resolution", [(544, 960), (512, 512), (33, 64), (1280, 720)])
def test_buckets_are_whole_mirrored_and_within_the_area(resolution: tuple[int, int]) -> None:
    sizes = bucket_sizes(resolution)
    assert sizes == sorted(set(sizes))
    for width, height in sizes:
        assert width % 16 == 0 and height % 16 == 0 and width > 0 and height > 0
        assert (height, width) in sizes
        assert width * height <= resolution[0] * resolution[1]


# A cache made at a bucket's size is found again: that size's own bucket is itself.
def test_a_bucket_is_its_own_bucket() -> None:
    for resolution in [(544, 960), (512, 512), (256, 256), (720, 1280)]:
        for size in bucket_sizes(resolution):
            assert bucket_size(size, resolution) == size


# Without upscaling a small picture keeps its size, cut to multiples of 16; a large one does not.
def test_small_pictures_are_not_enlarged_when_told_so() -> None:
    assert bucket_size((100, 50), (544, 960), bucket_no_upscale=True) == (96, 48)
    # Just as many pixels as the resolution has are not too many.
    assert bucket_size((2040, 256), (544, 960), bucket_no_upscale=True) == (2032, 256)
    assert bucket_size((1920, 1080), (544, 960), bucket_no_upscale=True) == bucket_size(
        (1920, 1080), (544, 960)
    )
    # Without buckets there is one size, and the other flag means nothing.
    assert bucket_size((100, 50), (544, 960), enable_bucket=False, bucket_no_upscale=True) == (
        544,
        960,
    )


# Sizes from which nothing can be made are one clear line.
def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="resolution 20x20 is too small"):
        bucket_sizes((20, 20))
    with pytest.raises(UserError, match="10x300 pixels is too small"):
        bucket_size((10, 300), (544, 960), bucket_no_upscale=True)
    with pytest.raises(UserError, match="0x300"):
        bucket_size((0, 300), (544, 960))
