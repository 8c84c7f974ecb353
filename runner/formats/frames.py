"""Which frames of a clip are trained on, chosen as musubi-tuner v0.3.4 chooses them.

Two steps: frames are dropped so that a clip of a known rate plays at the model's 24 frames a
second (`kept_frames`), then crops of the wanted lengths are cut from what was kept (`crops`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

from runner.config.latent_frames import valid_frames
from runner.config.schema import FRAME_EXTRACTIONS
from runner.core.errors import UserError

MODEL_FPS = 24.0


@dataclass(frozen=True)
class FrameExtraction:
    """How crops are cut from a clip; names and defaults are musubi's.

    target_frames: lengths of the crops, in frames, each 4N+1 (others are cut down to that).
    mode: one of FRAME_EXTRACTIONS. head: from the first frame; chunk: one after the other; slide:
        every `stride` frames; uniform: `sample` positions spread evenly; full: one crop, the whole
        clip.
    max_frames: the most frames of a "full" crop.
    source_fps: frames a second of the clips; None keeps every decoded frame.
    """

    target_frames: tuple[int, ...] = (1,)
    mode: str = "head"
    stride: int = 1
    sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None


@dataclass(frozen=True, order=True)
class Crop:
    """A run of kept frames: the first one's number (from 0) and how many."""

    position: int
    frames: int


def _positions(source_fps: float | None) -> Iterator[int]:
    """Where each decoded frame falls at 24 frames a second; endless."""
    step = 1.0 if source_fps is None else MODEL_FPS / source_fps
    # A running sum, not a product: musubi adds up, and the rounding differs.
    total = 0.0
    while True:
        yield int(total)
        total += step


def _kept_positions(source_fps: float | None) -> Iterator[tuple[bool, int]]:
    """For each decoded frame: is it kept, and where it falls. A place is filled once."""
    previous = -1
    for position in _positions(source_fps):
        yield position != previous, position
        previous = position


def kept_frames(decoded: int, source_fps: float | None) -> list[int]:
    """Numbers (from 0) of the decoded frames that are kept, of a clip of `decoded` frames.

    Above 24 frames a second frames are dropped; below, all are kept and none repeated.
    """
    flags = islice(_kept_positions(source_fps), decoded)
    return [index for index, (kept, _) in enumerate(flags) if kept]


def _from_head(extraction: FrameExtraction) -> bool:
    return extraction.mode == "head" or (extraction.mode == "uniform" and extraction.sample == 1)


def _lengths(extraction: FrameExtraction) -> list[int]:
    return sorted({valid_frames(frames) for frames in extraction.target_frames})


def choose(extraction: FrameExtraction) -> Iterator[bool]:
    """For each decoded frame in turn, whether it is loaded; ends where none further is needed.

    musubi stops a "head" extraction by the place a frame falls on, not by the number of frames
    kept. Below 24 frames a second it so loads too few for its longest target: `crops` says the
    same.
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
    """Crops cut from a clip of `frame_count` kept frames, in musubi's order, each once.

    Empty when the clip is shorter than every target: musubi leaves such a clip out in silence.

    Raises UserError for an unknown mode.
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
        places = (place for kept, place in _kept_positions(extraction.source_fps) if kept)
        loaded = takewhile(lambda place: place < max(lengths), islice(places, frame_count))
        frame_count = sum(1 for _ in loaded)
    found: list[Crop] = []
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
        found += (Crop(start, length) for start in starts)
    # Uniform positions of a short clip coincide; musubi writes that cache file several times.
    return list(dict.fromkeys(found))


def _spread(last: int, count: int) -> list[int]:
    """`count` positions from 0 to `last`, rounded down; numpy.linspace's arithmetic."""
    if count < 2:
        return [0][:count]
    step = last / (count - 1)
    return [math.floor(index * step) for index in range(count - 1)] + [last]
