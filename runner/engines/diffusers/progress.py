"""What the trainer says while it trains: metrics, averages and lines of progress."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any


class Metrics:
    """TensorBoard scalars under ``<folder>/network_train``, written to disk within a second.

    Without a folder nothing is written.
    """

    def __init__(self, folder: str | None) -> None:
        self._writer: Any = None
        self._flushed = 0.0
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(Path(folder) / "network_train"), flush_secs=1)

    def write(self, values: dict[str, float], step: int, *, flush: bool = False) -> None:
        """Add values at ``step``."""
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if flush or time.monotonic() - self._flushed >= 0.5:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Write the remaining values and close the file."""
        if self._writer is not None:
            self._writer.close()


class AverageLoss:
    """Average of the latest loss at each position of the epoch, as in musubi-tuner.

    From the second epoch on it is a moving average over as many steps as an epoch has. A loss that
    is not finite is left out, as its step is.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []

    def add(self, index: int, loss: float) -> None:
        """Record the loss of step ``index`` of the epoch, from 0."""
        if not math.isfinite(loss):
            return
        if index < len(self._losses):
            self._losses[index] = loss
        else:
            self._losses.append(loss)

    @property
    def value(self) -> float:
        """The average."""
        return math.fsum(self._losses) / len(self._losses) if self._losses else math.nan


class Progress:
    """Progress lines on standard output: the first step, the last, and at most one a second."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._begun = self._printed = time.monotonic()

    def show(self, epoch: int, step: int, loss: float, average: float) -> None:
        """Print a line, unless the last one is less than a second old; ``step`` counts from 1."""
        now = time.monotonic()
        if now - self._printed < 1 and step not in (1, self._steps):
            return
        self._printed = now
        speed = step / max(now - self._begun, 1e-9)
        print(
            f"step {step}/{self._steps} epoch {epoch} loss {loss:.4f} average {average:.4f} "
            f"{speed:.2f} steps/s",
            flush=True,
        )
