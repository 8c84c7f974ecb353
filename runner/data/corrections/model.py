"""How media are displayed, and the corrections that follow from it; pure.

A file that a viewer shows as it is stored needs no correction: the run uses the file itself, and
its cache keys are those of the file. All others are copied once, corrected and without loss, and
both engines read the copy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from runner.formats.bucket import Size
from runner.formats.frames import MODEL_FPS, FrameExtraction, choose

# Increase when a correction gives other pixels or frames, so that older copies are not used.
CORRECTION_VERSION = 1

Transfer = Literal["", "pq", "hlg"]

# Rates closer to each other than this fraction count as equal: containers round them.
RATE_TOLERANCE = 0.01
# A clip's rate is variable if a frame is further than this fraction of a frame from even times.
TIME_TOLERANCE = 0.25


@dataclass(frozen=True)
class Display:
    """How a viewer shows media, as far as that differs from the stored pixels and frames.

    Attributes:
        orientation: rotation and mirroring, as EXIF numbers them (1 to 8).
        transparent: whether any pixel is transparent.
        white: the stored value of a picture that is white; None for 8 bits per channel.
        black: the stored value that is black; below 0 where a picture has negative values.
        profile: the name of a colour profile whose colours differ from sRGB; "" for sRGB.
        shrink: the factor by which a huge picture is read smaller, across and down.
        pictures: the number of pictures in an animated file.
        heif: whether a picture is a HEIF file, which musubi-tuner can't open.
        stream: the index of the clip among the file's video streams; cover pictures are others.
        pixel_aspect: width and height of a clip's pixels, as far as that changes its size.
        transfer: the transfer function of an HDR clip.
        peak: the brightest light of an HDR clip, in cd/m2.
        interlaced: whether the frames of a clip hold two fields each.
        frames_stated: the number of frames that a clip's header states, if clearly fewer are left.
        times: the times of the frames in seconds, from 0, of a clip whose rate is variable.
    """

    orientation: int = 1
    transparent: bool = False
    white: float | None = None
    black: float = 0.0
    profile: str = ""
    shrink: int = 1
    pictures: int = 1
    heif: bool = False
    stream: int = 0
    pixel_aspect: tuple[int, int] = (1, 1)
    transfer: Transfer = ""
    peak: float = 0.0
    interlaced: bool = False
    frames_stated: int | None = None
    times: tuple[float, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the attributes that are not at their defaults, as JSON has them."""
        default = Display()
        return {key: value for key, value in vars(self).items() if value != getattr(default, key)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Display:
        """Return what :meth:`record` recorded.

        Raises:
            TypeError: it is not such a record.
        """
        lists = ("pixel_aspect", "times")
        values: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in record.items()}
        return cls(**values)


@dataclass(frozen=True)
class Correction:
    """What is done to media before a run trains on them; false if nothing is.

    Attributes:
        as_rgb: whether a picture is converted to 8-bit RGB.
        orientation, white, black, profile, shrink, stream, transfer, peak: those of
            :class:`Display`.
        background: the colour that transparent pixels are blended onto, as ``#rrggbb``.
        size: width and height of a clip's stored frames in square pixels, before rotation; None if
            the stored pixels are square.
        rate: the frames per second that a clip is brought to by its time stamps; None keeps all.
        frames: the indices of the stored frames of the copy, in order.
    """

    as_rgb: bool = False
    orientation: int = 1
    background: str = ""
    white: float | None = None
    black: float = 0.0
    profile: str = ""
    shrink: int = 1
    stream: int = 0
    size: Size | None = None
    transfer: Transfer = ""
    peak: float = 0.0
    rate: float | None = None
    frames: tuple[int, ...] = field(default=(), compare=False)

    def __bool__(self) -> bool:
        return self != NO_CORRECTION

    @property
    def only_rgb(self) -> bool:
        """Whether the copy differs from the file in its mode alone."""
        return self == Correction(as_rgb=True)

    @property
    def changes(self) -> bool:
        """Whether training sees something else than the stored pixels; a mode alone does not."""
        return bool(self) and not self.only_rgb

    @property
    def looks_different(self) -> bool:
        """Whether a picture of it looks different, so that a report shows it before and after."""
        return self.orientation != 1 or bool(
            self.background or self.white or self.profile or self.size or self.transfer
        )

    def cache_inputs(self, *, copy: bool) -> dict[str, Any]:
        """Return what the corrected pixels depend on, besides the file.

        Args:
            copy: whether it is for the copy, which has only the frames that the run uses; else for
                one of its crops.
        """
        inputs = {
            key: value
            for key, value in vars(self).items()
            if key not in ("as_rgb", "frames") and value != getattr(NO_CORRECTION, key)
        }
        if copy and self.frames:
            inputs["frames"] = len(self.frames)
        return {**inputs, "version": CORRECTION_VERSION}


NO_CORRECTION = Correction()
AS_STORED = Display()


def picture_correction(mode: str | None, display: Display, background: str) -> Correction:
    """Return the correction of a picture.

    Args:
        mode: PIL's mode.
        display: how it is displayed.
        background: the colour behind transparent pixels.
    """
    return Correction(
        as_rgb=mode != "RGB" or display.heif,
        orientation=display.orientation,
        background=background if display.transparent else "",
        white=display.white,
        black=display.black,
        profile=display.profile,
        shrink=display.shrink,
    )


def clip_correction(
    size: Size,
    frames: int,
    fps: float | None,
    display: Display,
    extraction: FrameExtraction,
    *,
    target: float | None,
    background: str,
) -> Correction:
    """Return the correction of a clip.

    Args:
        size: width and height in pixels, as displayed.
        frames: the number of its frames.
        fps: its frames per second.
        display: how it is displayed.
        extraction: how crops are cut from it.
        target: the frames per second that faster clips are brought to; None keeps every frame.
        background: the colour behind transparent pixels.
    """
    rate, played = played_frames(frames, fps, display, target)
    correction = Correction(
        orientation=display.orientation,
        background=background if display.transparent else "",
        stream=display.stream,
        size=None if display.pixel_aspect == (1, 1) else turned_size(size, display.orientation),
        transfer=display.transfer,
        peak=display.peak,
        rate=rate,
    )
    if not correction:
        return correction
    # With a set source_fps the trainer drops frames of the copy, so it has all that it decodes.
    needed = sum(1 for _ in zip(played, choose(extraction), strict=False))
    return Correction(**{**vars(correction), "frames": tuple(played[:needed])})


def square_size(size: Size, pixel_aspect: tuple[int, int]) -> Size:
    """Return width and height in square pixels, the height kept (FFmpeg's ``scale=iw*sar:ih``)."""
    return max(1, size[0] * pixel_aspect[0] // pixel_aspect[1]), size[1]


def turned_size(size: Size, orientation: int) -> Size:
    """Return width and height after a rotation, or before it."""
    return (size[1], size[0]) if orientation > 4 else size


def played_frames(
    frames: int, fps: float | None, display: Display, target: float | None
) -> tuple[float | None, Sequence[int]]:
    """Choose the frames of a clip that are shown at the frames per second that it is brought to.

    They are those of FFmpeg's ``fps`` filter: each the last one that begins before the middle of
    its time.

    Returns:
        That rate, None if all frames are kept as they are, and the indices of the stored frames.
    """
    every = range(frames)
    if target is None or fps is None or frames < 2:
        return None, every
    if display.times:
        # A pause must not slow all the rest: the usual step counts, not the average one.
        steps = sorted(later - earlier for earlier, later in pairwise(display.times))
        target = min(target, 1 / max(steps[len(steps) // 2], 1e-3))
    elif fps <= target * (1 + RATE_TOLERANCE):
        return None, every
    # Half a time rounds up; what a product of fractions is short of it is rounding of its own.
    slots = [
        int((display.times[index] if display.times else index / fps) * target + 0.5 + 1e-6)
        for index in every
    ]
    seconds = display.times[-1] + 1 / target if display.times else frames / fps
    count = max(1, int(seconds * target + 0.5 + 1e-6))
    return target, [bisect_right(slots, n) - 1 for n in range(count)]


def uneven_times(times: Sequence[float]) -> tuple[float, ...]:
    """Return the times of a clip's frames from 0 if its rate is variable, else nothing."""
    if len(times) < 3:
        return ()
    ordered = sorted(times)
    step = (ordered[-1] - ordered[0]) / (len(ordered) - 1)
    offsets = [time - ordered[0] for time in ordered]
    if step <= 0 or all(
        abs(offset - index * step) <= TIME_TOLERANCE * step for index, offset in enumerate(offsets)
    ):
        return ()
    return tuple(round(offset, 6) for offset in offsets)


def target_rate(fps: str, source_fps: float | None) -> float | None:
    """Return the frames per second that ``dataset.fps`` asks for; None to keep every frame.

    A set ``source_fps`` wins: the trainer then drops frames by it.
    """
    if source_fps is not None or fps == "native":
        return None
    return MODEL_FPS if fps == "auto" else float(fps)
