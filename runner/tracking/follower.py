"""A trainer's metrics, sent from its TensorBoard files to MLflow while it trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from runner.tracking.client import first_line
from runner.tracking.metrics import Point, StepTimer, with_speed
from runner.tracking.mlflow_run import Writer
from runner.tracking.tensorboard_tail import TensorBoardTail


class MetricsFollower:
    """A thread that sends a trainer's metrics to MLflow while it trains."""

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        *,
        interval: float = 2.0,
        on_points: Callable[[list[Point]], None] | None = None,
        samples: float | None = None,
        steps: int | None = None,
        previews_after: Sequence[int] = (),
    ) -> None:
        """Prepare the thread; :meth:`start` starts it.

        Args:
            folder: the folder of the event files.
            writer: the run that the metrics are sent to.
            interval: seconds between two readings of the files.
            on_points: called from the thread with the new points, step times included, before they
                are sent.
            samples: average number of samples per step, for the speed.
            steps: total number of steps, for the speed.
            previews_after: the steps after which previews are made, for the speed.
        """
        self._tail = TensorBoardTail(folder)
        self._folder = folder
        self._writer = writer
        self._interval = interval
        self._on_points = on_points
        self._timer = StepTimer(samples=samples, steps=steps, previews_after=previews_after)
        self._trouble: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def start(self) -> MetricsFollower:
        """Start the thread."""
        self._thread.start()
        return self

    def stop(self) -> str | None:
        """Send the remaining metrics and stop; call it after the trainer ended.

        Returns:
            A warning of one line if something could not be read, else None.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._step()
        unread = self._tail.unread_bytes()
        if unread:
            return (
                f"{unread:,} bytes of TensorBoard events below {self._folder} are cut or corrupt; "
                "the metrics in and after them are missing"
            )
        return self._trouble

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            self._step()

    def _step(self) -> None:
        try:
            points = with_speed(self._tail.read(), self._timer)
        except Exception as error:
            self._trouble = f"metrics could not be read: {first_line(error)}"
            return
        if points and self._on_points is not None:
            try:
                self._on_points(points)
            except Exception as error:
                self._trouble = f"metrics could not be shown: {first_line(error)}"
        # Even without new points, since those of a failed call may be waiting.
        self._writer.log_points(points)
