"""A sweep as a whole: its name, its parent run, and how it ended."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.tracking.mlflow_run import Status

# Carries the sweep's id to jobs that a launcher starts in other processes.
VARIABLE = "RUNNER_SWEEP_ID"


@dataclass
class Sweep:
    """One ``-m`` command line."""

    id: str
    overrides: tuple[str, ...]
    outputs: Path | None = None
    # Kept in memory, since it may hold a password.
    uri: str | None = None

    @classmethod
    def begin(cls, arguments: Sequence[str]) -> Sweep:
        """Name a new sweep."""
        sweep_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        os.environ[VARIABLE] = sweep_id
        return cls(sweep_id, tuple(a for a in arguments if not a.startswith("-")))

    @classmethod
    def from_environment(cls, overrides: Sequence[str]) -> Sweep | None:
        """The sweep that a launcher started this process for, if any."""
        sweep_id = os.environ.get(VARIABLE)
        return cls(sweep_id, tuple(overrides)) if sweep_id else None

    @property
    def swept(self) -> tuple[str, ...]:
        """Keys that have several values."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import OverrideParseException

        try:
            parsed = OverridesParser.create().parse_overrides(list(self.overrides))
        except OverrideParseException:
            return ()
        return tuple(one.key_or_group for one in parsed if one.is_sweep_override())

    def close(self, codes: Sequence[int]) -> None:
        """End the parent run with what truly came of the sweep."""
        if self.outputs is None or self.uri is None:
            return
        from runner.tracking.sweep import close_parent

        ended = any(code >= 128 for code in codes)
        status: Status = "KILLED" if ended else "FAILED" if any(codes) else "FINISHED"
        close_parent(self.outputs, self.id, status, uri=self.uri)
