"""Metric points: their shape, names MLflow accepts, and the speed derived from them. Pure."""

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
# musubi logs it at every batch: with gradient accumulation several times at one step, the first
# of them when the step is done, and at step 0 before there was any.
STEP_CLOCK = "loss/current"
# The time left follows the median of this many steps, which a checkpoint or preview can't sway.
RECENT_STEPS = 25
MAX_NAME = 250  # characters; MLflow refuses longer keys

_REFUSED = re.compile(r"[^\w.\- :/]")


@dataclass(frozen=True)
class Point:
    """One value of one metric. `step` is the optimizer step, `timestamp_ms` Unix milliseconds."""

    key: str
    value: float
    step: int
    timestamp_ms: int


def clean_metric_name(key: str) -> str:
    """`key` as MLflow accepts it; also right for parameter and tag keys.

    MLflow allows letters, digits, `_ - . space : /`, at most 250 characters, and no name that
    reads as another path (`a//b`, `../a`, `/a`). Refused characters become `_`; a name that had
    to be shortened ends in eight hexadecimal digits of its hash, so that two stay apart.
    """
    parts = [part for part in _REFUSED.sub("_", key).split("/") if part not in ("", ".")]
    parts = ["_" + part if part.startswith("..") else part for part in parts]
    name = "/".join(parts) or "unnamed"
    if len(name) > MAX_NAME:
        name = name[: MAX_NAME - 9] + "-" + hashlib.sha256(key.encode()).hexdigest()[:8]
    return name


class StepTimer:
    """Turns `loss/current` points into seconds a step, batch by batch.

    The time between two points covers everything the trainer did between them, so a step that
    saved a checkpoint or drew samples is long. With `samples` (a step, on average) and `steps` (in
    all) it also tells samples a second and the seconds left.
    """

    def __init__(self, *, samples: float | None = None, steps: int | None = None) -> None:
        self._samples, self._steps = samples, steps
        self._last: Point | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def derive(self, points: Iterable[Point]) -> list[Point]:
        """The `time/...` points that follow from `points` and the ones given before."""
        derived = []
        for point in points:
            if point.key != STEP_CLOCK or point.step < 1:
                continue
            if self._last is not None and point.step == self._last.step:
                continue
            last, self._last = self._last, point
            # A step that does not follow is a restarted count, a clock set back gives nonsense.
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
    """`points`, then the step times they give; one `timer` goes on from call to call."""
    points = list(points)
    return points + (timer or StepTimer()).derive(points)
