"""The train stage beside the trainer: the speed it tells of, and the file that it leaves."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cache_process import context_of
from other_processes import pictures

from runner.core.command import Command
from runner.core.console import Console
from runner.core.errors import StageError
from runner.pipeline.stages.train import TRAIN
from runner.tracking.metrics import Point
from runner.tracking.mlflow_run import NullWriter

if TYPE_CHECKING:
    from runner.pipeline.context import Context


class Noting(NullWriter):
    """A writer that keeps the points it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Point] = []

    def log_points(self, points: Sequence[Point]) -> None:
        self.points += points


def trained(folder: Path, *seconds: float) -> None:
    """What a trainer leaves that ended its first steps at these times."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder / "tensorboard"))
    for step, at in enumerate(seconds, 1):
        values = [Summary.Value(tag="loss/current", simple_value=0.5)]
        writer.add_event(Event(wall_time=1000 + at, step=step, summary=Summary(value=values)))
    writer.close()


WRITES = """
from pathlib import Path
final = Path("checkpoints/lora.safetensors")
final.parent.mkdir(exist_ok=True)
"""


def training_as(context: Context, code: str) -> None:
    """Have the trainer of a plan be this Python."""
    trainer = Command((sys.executable, "-S", "-c", WRITES + code))
    stages = (
        replace(stage, commands=(trainer, *stage.commands[1:])) if stage.name == "train" else stage
        for stage in context.plan.stages
    )
    context.plan = replace(context.plan, stages=tuple(stages))


# Samples a second are those of an average step, not of a full one, by the time that it took: five
# items in batches of two are three steps an epoch, whatever the number of epochs.
def test_samples_a_second(tmp_path: Path) -> None:
    silent = Console.for_stream(io.StringIO())
    options = ("engine=diffusers", "dataset.batch_size=2", "training.epochs=4", "sampling=none")
    context = context_of(
        tmp_path / "out", pictures(tmp_path / "media", 5), *options, console=silent
    )
    assert (context.plan.steps_per_epoch, context.plan.steps) == (3, 12)
    training_as(context, "final.write_bytes(b'trained')")
    context.writer = writer = Noting()
    trained(context.run_dir, 0.0, 2.0, 2.5)
    TRAIN.run(context)
    logged = {(point.key, point.step): point.value for point in writer.points}
    assert logged["time/step_seconds", 2] == 2.0
    assert logged["time/samples_per_second", 2] == pytest.approx(5 / 3 / 2.0)
    assert logged["time/samples_per_second", 3] == pytest.approx(5 / 3 / 0.5)
    assert logged["time/seconds_left", 3] == pytest.approx(9 * 1.25)
    assert (context.run_dir / "lora.safetensors").read_bytes() == b"trained"


# The run's LoRA is the trainer's newest, a file of its own name and no link to another, also in
# place of what an earlier attempt left there, whether the trainer writes a new file or into the old
# one; a trainer that ends well and writes none is reported with its log.
@pytest.mark.parametrize("anew", ["final.unlink(missing_ok=True)", "pass"])
def test_the_newest_lora_is_taken(tmp_path: Path, anew: str) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    place = context.run_dir / "lora.safetensors"
    for content in (b"first", b"second"):
        training_as(context, f"{anew}\nfinal.write_bytes({content!r})")
        TRAIN.run(context)
        assert place.read_bytes() == content
        assert not place.is_symlink()
    training_as(context, "final.unlink()")
    log = context.log("train")
    with pytest.raises(StageError, match=rf"ended without writing .* \(log: {log}\)$"):
        TRAIN.run(context)
    assert place.read_bytes() == b"second"


# That the file can't be put there is reported as such, whatever warnings the trainer printed.
def test_a_lora_that_cant_be_kept(tmp_path: Path) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    (context.run_dir / "lora.safetensors").mkdir(parents=True)
    warning = "import traceback\ntry: 1 / 0\nexcept ArithmeticError: traceback.print_exc()"
    training_as(context, f"final.write_bytes(b'x')\n{warning}")
    with pytest.raises(StageError, match=r"^cp: .*lora\.safetensors.* \(exit code 1; log: "):
        TRAIN.run(context)
