"""Metric points, names that MLflow accepts, and the speed derived from points. Pure."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEP_SECONDS = "time/step_seconds"
SAMPLES_PER_SECOND = "time/samples_per_second"
SECONDS_LEFT = "time/seconds_left"
PREVIEW_SECONDS = "time/preview_seconds"
# musubi-tuner logs it at every batch: with gradient accumulation several times per step, first when
# the step is done, and at step 0 before the first step.
STEP_CLOCK = "loss/current"
# The time left is estimated from the median of this many steps, so that a checkpoint does not
# change it.
RECENT_STEPS = 25
# Steps in a row whose loss is not finite that end a run. A single one can be a picture that
# overflowed in fp16, whose step is left out; weights that are NaN give no other loss again.
NOT_FINITE_STEPS = 5
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


class LossGuard:
    """Find the point from which a loss is lost: :data:`NOT_FINITE_STEPS` steps in a row."""

    def __init__(self) -> None:
        self._last_step = 0
        self._in_a_row = 0
        self.failed_from: int | None = None

    def add(self, step: int, loss: float) -> bool:
        """Record the loss of a step; return whether training is to end.

        A step that is recorded again, as one with gradient accumulation is, counts once.
        """
        if math.isfinite(loss):
            self._in_a_row = 0
        elif step != self._last_step:
            self._in_a_row += 1
        self._last_step = step
        if self._in_a_row >= NOT_FINITE_STEPS and self.failed_from is None:
            self.failed_from = step - NOT_FINITE_STEPS + 1
        return self.failed_from is not None

    @property
    def message(self) -> str:
        """What to report once training is to end."""
        return (
            f"the loss was not finite (NaN or infinite) for {NOT_FINITE_STEPS} steps in a row, "
            f"from step {self.failed_from} on"
        )


class StepTimer:
    """Seconds per step, derived from ``loss/current`` points as they arrive.

    The time between two points covers everything the trainer did between them, so a step that
    saved a checkpoint is long. Where previews were made between them, what is beyond an average
    step is the previews' time, and no step's.
    """

    def __init__(
        self,
        *,
        samples: float | None = None,
        steps: int | None = None,
        previews_after: Sequence[int] = (),
    ) -> None:
        """Start with no points.

        Args:
            samples: average number of samples per step, for the samples per second.
            steps: total number of steps, for the seconds left.
            previews_after: the steps after which previews are made.
        """
        self._samples, self._steps, self._previews_after = samples, steps, previews_after
        self._last: Point | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._preview_seconds: list[float] = []

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
            values = self._values(last, point)
            derived += [
                Point(key, value, point.step, point.timestamp_ms) for key, value in values.items()
            ]
        return derived

    def _values(self, last: Point, point: Point) -> dict[str, float]:
        seconds, steps = (point.timestamp_ms - last.timestamp_ms) / 1000, point.step - last.step
        previews = sum(last.step <= step < point.step for step in self._previews_after)
        values: dict[str, float] = {}
        if previews:
            each = max(0.0, seconds - self._usual() * steps) / previews
            self._preview_seconds.append(each)
            values[PREVIEW_SECONDS] = each
        else:
            values[STEP_SECONDS] = seconds / steps
            self._recent.append(seconds / steps)
            if self._samples is not None and seconds > 0:
                values[SAMPLES_PER_SECOND] = self._samples * steps / seconds
        if self._steps is not None:
            values[SECONDS_LEFT] = self._seconds_left(self._steps, point.step)
        return values

    def _usual(self) -> float:
        """Return the seconds of a usual step; 0 while previews follow every step."""
        return statistics.median(self._recent) if self._recent else 0.0

    def _seconds_left(self, steps: int, step: int) -> float:
        left = max(0, steps - step) * self._usual()
        # How long previews take is not known before the first ones were made.
        if self._preview_seconds:
            ahead = sum(after >= step for after in self._previews_after)
            left += ahead * statistics.median(self._preview_seconds)
        return left


def with_speed(points: Iterable[Point], timer: StepTimer | None = None) -> list[Point]:
    """Return ``points`` and the step times derived from them; pass the same ``timer`` each time."""
    points = list(points)
    return points + (timer or StepTimer()).derive(points)
