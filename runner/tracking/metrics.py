"""Metric points, names that MLflow accepts, and the speed derived from points. Pure."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

STEP_SECONDS = "time/step_seconds"
SAMPLES_PER_SECOND = "time/samples_per_second"
SECONDS_LEFT = "time/seconds_left"
# musubi-tuner logs it at every batch: with gradient accumulation several times per step, first when
# the step is done, and at step 0 before the first step.
STEP_CLOCK = "loss/current"
# The time left is estimated from the median of this many steps, so that a checkpoint or preview
# does not change it.
RECENT_STEPS = 25
MAX_NAME = 250  # characters; MLflow refuses longer keys

_REFUSED = re.compile(r"[^\w.\- :/]")


@dataclass(frozen=True)
class Point:
    """One value of a metric; ``step`` is the optimizer step, ``timestamp_ms`` Unix milliseconds."""

    key: str
    value: float
    step: int
    timestamp_ms: int


def clean_metric_name(key: str) -> str:
    """Turn ``key`` into a name that MLflow accepts for a metric, parameter or tag.

    MLflow allows letters, digits, ``_ - . space : /``, at most 250 characters, and no name that is
    not a plain path (``a//b``, ``../a``, ``/a``). Refused characters become ``_``; a shortened name
    ends in eight hexadecimal digits of its hash, so that two names stay different.
    """
    parts = [part for part in _REFUSED.sub("_", key).split("/") if part not in ("", ".")]
    parts = ["_" + part if part.startswith("..") else part for part in parts]
    name = "/".join(parts) or "unnamed"
    if len(name) > MAX_NAME:
        name = name[: MAX_NAME - 9] + "-" + hashlib.sha256(key.encode()).hexdigest()[:8]
    return name


class StepTimer:
    """Seconds per step, derived from ``loss/current`` points as they arrive.

    The time between two points covers everything the trainer did between them, so a step that
    saved a checkpoint or made previews is long. ``samples`` (average per step) adds the samples per
    second, ``steps`` (in total) the seconds left.
    """

    def __init__(self, *, samples: float | None = None, steps: int | None = None) -> None:
        self._samples, self._steps = samples, steps
        self._last: Point | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def derive(self, points: Iterable[Point]) -> list[Point]:
        """Return the ``time/...`` points derived from ``points`` and those of earlier calls."""
        derived = []
        for point in points:
            if point.key != STEP_CLOCK or point.step < 1:
                continue
            if self._last is not None and point.step == self._last.step:
                continue
            last, self._last = self._last, point
            # Skip a restarted step count and a clock that was set back.
            if last is None or point.step <= last.step or point.timestamp_ms < last.timestamp_ms:
                continue
            seconds = (point.timestamp_ms - last.timestamp_ms) / 1000 / (point.step - last.step)
            derived.append(Point(STEP_SECONDS, seconds, point.step, point.timestamp_ms))
            derived += self._speed(seconds, point)
        return derived

    def _speed(self, seconds: float, point: Point) -> list[Point]:
        self._recent.append(seconds)
        values: dict[str, float] = {}
        if self._samples is not None and seconds > 0:
            values[SAMPLES_PER_SECOND] = self._samples / seconds
        if self._steps is not None:
            left = max(0, self._steps - point.step)
            values[SECONDS_LEFT] = left * statistics.median(self._recent)
        return [Point(key, value, point.step, point.timestamp_ms) for key, value in values.items()]


def with_speed(points: Iterable[Point], timer: StepTimer | None = None) -> list[Point]:
    """Return ``points`` and the step times derived from them; pass the same ``timer`` each time."""
    points = list(points)
    return points + (timer or StepTimer()).derive(points)
