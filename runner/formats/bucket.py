"""Which size a picture or a clip is trained at, chosen as musubi-tuner v0.3.4 chooses it.

A bucket is a width and a height, both multiples of 16 pixels, with about the area of the asked
resolution. Training puts items of one bucket in one batch; the latent caches are made at that size.
"""

from __future__ import annotations

import math

from runner.core.errors import UserError

Size = tuple[int, int]  # width, height, pixels

# The VAE shrinks 16 times in space and the transformer takes whole latents.
STEP = 16


def _floor(value: int) -> int:
    return value - value % STEP


def bucket_sizes(resolution: Size) -> list[Size]:
    """All buckets for a resolution, sorted by width then height.

    Widths run from half the side of the square of the same area up to that side, in steps of 16
    pixels; each height fills the area; every bucket is there upright and lying.

    Raises UserError when the resolution is too small to hold one bucket.
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
    """The size (pixels) a medium of `media_size` is resized and cropped to.

    With `enable_bucket` off it is the resolution itself. With `bucket_no_upscale` a medium of no
    more pixels than the resolution keeps its size, cut down to multiples of 16. Otherwise it is
    the bucket whose width-to-height ratio differs least, the first in order if several do.

    For clips both flags must be left at their defaults: musubi ignores them when it caches video.

    Raises UserError when nothing of the medium would remain, or the resolution is too small.
    """
    width, height = media_size
    if width < 1 or height < 1:
        raise UserError(f"a picture of {width}x{height} pixels can't be put in a bucket")
    if not enable_bucket:
        return resolution
    # Before the short cut below, so that a bad resolution is named whatever the medium is.
    sizes = bucket_sizes(resolution)
    if bucket_no_upscale and width * height <= resolution[0] * resolution[1]:
        if width < STEP or height < STEP:
            raise UserError(
                f"a picture of {width}x{height} pixels is too small to be kept at its own size "
                f"(the least is {STEP}x{STEP}): remove it or set dataset.bucket_no_upscale=false"
            )
        return _floor(width), _floor(height)
    ratio = width / height
    return min(sizes, key=lambda size: abs(size[0] / size[1] - ratio))
