"""A sweep as a whole: its name, its parent run, and how it ended."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Carries the sweep's id to jobs that a launcher starts in other processes.
VARIABLE = "RUNNER_SWEEP_ID"


@dataclass
class Sweep:
    """One ``-m`` command line."""

    id: str
    overrides: tuple[str, ...]
    jobs: int = 0
    outputs: Path | None = None
    parents: set[str] = field(default_factory=set)

    @classmethod
    def begin(cls, arguments: Sequence[str]) -> Sweep:
        """Name a new sweep."""
        sweep_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        os.environ[VARIABLE] = sweep_id
        return cls(sweep_id, tuple(a for a in arguments if not a.startswith("-")))

    @property
    def swept(self) -> tuple[str, ...]:
        """Keys that have several values."""
        return tuple(
            key
            for key, _, value in (text.partition("=") for text in self.overrides)
            if ("," in value and not value.startswith("[")) or "range(" in value
        )

    def close(self, codes: Sequence[int]) -> None:
        """End the parent run with what truly came of the sweep."""
        if self.outputs is None or not self.parents:
            return
        from runner.tracking.sweep import close_parent

        if any(code >= 128 for code in codes):
            status = "KILLED"
        elif any(codes):
            status = "FAILED"
        else:
            status = "FINISHED"
        close_parent(self.outputs, self.id, status)
