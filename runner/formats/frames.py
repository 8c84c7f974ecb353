"""Which frames of a clip are trained on, chosen as musubi-tuner v0.3.4 chooses them.

First, frames are dropped so that a clip of a known rate plays at the model's 24 frames per second
(:func:`kept_frames`); then crops of the target lengths are cut from those kept (:func:`crops`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

from runner.config.dataset_schema import FRAME_EXTRACTIONS
from runner.config.latent_frames import valid_frames
from runner.core.errors import UserError

MODEL_FPS = 24.0


@dataclass(frozen=True)
class FrameExtraction:
    """How crops are cut from a clip; names and defaults are musubi-tuner's.

    Attributes:
        target_frames: lengths of the crops in frames; rounded down to the form 4N+1.
        mode: one of FRAME_EXTRACTIONS. head: one crop from the first frame; chunk: one after the
            other; slide: one every ``stride`` frames; uniform: ``sample`` crops spread evenly;
            full: one crop of the whole clip.
        stride: frames between the starts of crops (slide).
        sample: crops per length (uniform).
        max_frames: maximum length of the crop (full).
        source_fps: frames per second of the clips; None keeps every decoded frame.
    """

    target_frames: tuple[int, ...] = (1,)
    mode: str = "head"
    stride: int = 1
    sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None


@dataclass(frozen=True, order=True)
class Crop:
    """A piece of a clip: the index of its first kept frame (from 0) and its length in frames."""

    position: int
    frames: int


def _positions(source_fps: float | None) -> Iterator[int]:
    """Yield the position at 24 frames per second of each decoded frame, without end."""
    step = 1.0 if source_fps is None else MODEL_FPS / source_fps
    # A running sum, not a product: musubi-tuner adds up, and the rounding differs.
    total = 0.0
    while True:
        yield int(total)
        total += step


def _kept_positions(source_fps: float | None) -> Iterator[tuple[bool, int]]:
    """Yield (kept, position) for each decoded frame; only the first at a position is kept."""
    previous = -1
    for position in _positions(source_fps):
        yield position != previous, position
        previous = position


def kept_frames(decoded: int, source_fps: float | None) -> list[int]:
    """Return the indices of the frames that are kept, of a clip of ``decoded`` frames.

    Above 24 frames per second some are dropped; below, all are kept and none is repeated.
    """
    flags = islice(_kept_positions(source_fps), decoded)
    return [index for index, (kept, _) in enumerate(flags) if kept]


def _from_head(extraction: FrameExtraction) -> bool:
    return extraction.mode == "head" or (extraction.mode == "uniform" and extraction.sample == 1)


def _lengths(extraction: FrameExtraction) -> list[int]:
    return sorted({valid_frames(frames) for frames in extraction.target_frames})


def choose(extraction: FrameExtraction) -> Iterator[bool]:
    """Yield for each decoded frame whether it is loaded; end when no more frames are needed.

    musubi-tuner ends a "head" extraction by a frame's position at 24 frames per second, not by the
    number of kept frames. Below that rate it therefore loads too few frames for the longest target;
    :func:`crops` accounts for this.
    """
    longest = max(_lengths(extraction), default=0)
    kept = 0
    for keep, position in _kept_positions(extraction.source_fps):
        if _from_head(extraction) and position >= longest:
            return
        if extraction.mode == "full" and kept >= extraction.max_frames:
            return
        kept += keep
        yield keep


def crops(frame_count: int, extraction: FrameExtraction) -> list[Crop]:
    """Return the different crops of a clip of ``frame_count`` kept frames, in musubi-tuner's order.

    There are none when the clip is shorter than every target; musubi-tuner skips such a clip
    without a message.

    Raises:
        UserError: the mode is unknown.
    """
    mode = extraction.mode
    if mode not in FRAME_EXTRACTIONS:
        raise UserError(
            f"frame_extraction {mode!r} is unknown: use one of {', '.join(FRAME_EXTRACTIONS)}"
        )
    if frame_count < 1:
        return []
    if mode == "full":
        return [Crop(0, valid_frames(min(frame_count, extraction.max_frames)))]
    lengths = _lengths(extraction)
    if _from_head(extraction):
        positions = (at for kept, at in _kept_positions(extraction.source_fps) if kept)
        loaded = takewhile(lambda at: at < max(lengths), islice(positions, frame_count))
        frame_count = sum(1 for _ in loaded)
    result: list[Crop] = []
    for length in lengths:
        last = frame_count - length
        if last < 0:
            continue
        starts: Iterable[int]
        if _from_head(extraction):
            starts = (0,)
        elif mode == "chunk":
            starts = range(0, last + 1, length)
        elif mode == "slide":
            starts = range(0, last + 1, extraction.stride)
        else:
            starts = _spread(last, extraction.sample)
        result += (Crop(start, length) for start in starts)
    # Uniform positions of a short clip coincide; musubi-tuner writes that file several times.
    return list(dict.fromkeys(result))


def _spread(last: int, count: int) -> list[int]:
    """Return ``count`` positions from 0 to ``last``, rounded down, as numpy.linspace does."""
    if count < 2:
        return [0][:count]
    step = last / (count - 1)
    return [math.floor(index * step) for index in range(count - 1)] + [last]
