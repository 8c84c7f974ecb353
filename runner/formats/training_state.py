"""Read what a state folder of accelerate says about the training that wrote it.

musubi-tuner's ``--save_state`` calls ``Accelerator.save_state``, which writes the network as
``model.safetensors``, and optimizer, schedule and generators as pickles: ``optimizer.bin``,
``scheduler.bin`` and ``random_states_0.pkl`` (accelerate 1.15, ``checkpointing.py``). Which task
and which optimizer they are of stands in none of them. A pickle is never loaded, as it could run
code: the instructions of the schedule's, which are a few dozen, are listed.
"""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.core.errors import UserError
from runner.formats.lora import LoraInfo, describe
from runner.formats.safetensors_header import read_header

# A schedule's pickle has hundreds of bytes; more is not read.
_LONGEST_SCHEDULE = 1 << 20


@dataclass(frozen=True)
class Schedule:
    """The state of a learning-rate schedule.

    Attributes:
        steps: number of optimizer steps taken; None if it is not said.
        learning_rates: the rate of each parameter group before the schedule's factor.
        has_factors: whether it is a LambdaLR, as all schedules of transformers are; a state of
            another class can't be loaded into one.
    """

    steps: int | None
    learning_rates: tuple[float, ...]
    has_factors: bool


@dataclass(frozen=True)
class TrainingState:
    """What a state folder says.

    Attributes:
        network: kind, rank and alpha of the network.
        modules: the names of its modules, as LoRA files have them.
        schedule: None if there is none, as with a schedule-free optimizer.
    """

    network: LoraInfo
    modules: frozenset[str]
    schedule: Schedule | None


def read_state(folder: Path) -> TrainingState:
    """Read a state folder; neither torch nor a pickle is loaded.

    Raises:
        UserError: a file can't be read, or the network is none of this model.
    """
    network = folder / "model.safetensors"
    info = describe(network)
    modules = frozenset(key.partition(".")[0] for key in read_header(network))
    return TrainingState(info, modules, _schedule(folder / "scheduler.bin"))


def _schedule(file: Path) -> Schedule | None:
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            if archive.getinfo(name).file_size > _LONGEST_SCHEDULE:
                raise ValueError
            pickled = archive.read(name)
        listed = [
            (code.name, value)
            for code, value, _ in pickletools.genops(pickled)
            # These only number what was just made.
            if "PUT" not in code.name and code.name != "MEMOIZE"
        ]
    except (OSError, StopIteration, ValueError, zipfile.BadZipFile):
        raise UserError(f"{file} can't be read as the state of a schedule") from None
    steps = _after(listed, "last_epoch")[:1]
    return Schedule(
        steps=steps[0] if steps and isinstance(steps[0], int) else None,
        learning_rates=tuple(v for v in _after(listed, "base_lrs") if isinstance(v, float)),
        has_factors=("BINUNICODE", "lr_lambdas") in listed,
    )


def _after(listed: list[tuple[str, Any]], key: str) -> list[Any]:
    """Return the plain values between a key of the pickled dictionary and the next text."""
    texts = [n for n, (code, _) in enumerate(listed) if "UNICODE" in code]
    for start, end in zip(texts, [*texts[1:], len(listed)], strict=True):
        if listed[start][1] == key:
            return [value for _, value in listed[start + 1 : end] if value is not None]
    return []
