"""The size that a picture or clip is trained at, chosen as musubi-tuner v0.3.4 does.

A bucket is a width and a height, both multiples of 16 pixels, with about the area of the resolution
asked for. A batch has items of one bucket only; latents are encoded at the bucket's size.
"""

from __future__ import annotations

import math

from runner.core.errors import UserError

Size = tuple[int, int]  # width, height, pixels

# The VAE divides width and height by 16.
STEP = 16


def _floor(value: int) -> int:
    return value - value % STEP


def bucket_sizes(resolution: Size) -> list[Size]:
    """Return all buckets for a resolution, sorted by width, then height.

    The shorter side runs from half the side of the square of the same area up to that side, in
    steps of 16 pixels; the longer one fills the area. Each bucket exists in portrait and landscape.

    Raises:
        UserError: the resolution is too small for a bucket.
    """
    width, height = resolution
    area = width * height
    side = math.isqrt(area) if area > 0 else 0
    smallest = _floor(side // 2)
    if smallest < STEP:
        raise UserError(
            f"resolution {width}x{height} is too small for buckets: "
            f"width times height must be at least {2 * STEP}x{2 * STEP} pixels"
        )
    sizes: set[Size] = set()
    for short in range(smallest, side + STEP, STEP):
        long = _floor(area // short)
        sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def bucket_size(
    media_size: Size,
    resolution: Size,
    *,
    enable_bucket: bool = True,
    bucket_no_upscale: bool = False,
) -> Size:
    """Choose the size that a picture or clip is resized and cropped to.

    For clips both flags must keep their defaults: musubi-tuner ignores them when it encodes clips.

    Args:
        media_size: width and height in pixels.
        resolution: width and height that were asked for.
        enable_bucket: choose the bucket with the most similar aspect ratio, the first if several
            are; if off, the result is the resolution itself.
        bucket_no_upscale: keep the size of media with no more pixels than the resolution, cut down
            to multiples of 16.

    Raises:
        UserError: nothing of the picture would remain, or the resolution is too small.
    """
    width, height = media_size
    if width < 1 or height < 1:
        raise UserError(f"a picture of {width}x{height} pixels can't be put in a bucket")
    if not enable_bucket:
        return resolution
    # First, so that a bad resolution is reported whatever the media size.
    sizes = bucket_sizes(resolution)
    if bucket_no_upscale and width * height <= resolution[0] * resolution[1]:
        if width < STEP or height < STEP:
            raise UserError(
                f"a picture of {width}x{height} pixels is too small to be kept at its own size "
                f"(the minimum is {STEP}x{STEP}): remove it or set dataset.bucket_no_upscale=false"
            )
        return _floor(width), _floor(height)
    ratio = width / height
    return min(sizes, key=lambda size: abs(size[0] / size[1] - ratio))
