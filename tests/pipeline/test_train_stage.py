"""The train stage beside the trainer: the speed it tells of, and the file that it leaves."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from cache_process import context_of
from other_processes import pictures

from runner.core.command import Command
from runner.core.console import Console
from runner.core.errors import StageError
from runner.pipeline.stages import STAGES
from runner.pipeline.stages.train import TRAIN, preview_steps
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
import json, sys
from pathlib import Path
from struct import pack
final = Path("checkpoints/lora.safetensors")
final.parent.mkdir(exist_ok=True)

def write(dtype="F32", steps=None, up=b"trained!", down=b"others!!", names=("up", "down")):
    size, place, header = {"F64": 8, "F32": 4}.get(dtype, 2), 0, {}
    if steps is not None:
        header["__metadata__"] = {"ss_steps": str(steps)}
    data = {"up": up, "down": down}
    for name in names:
        shape, offsets = [1, len(data[name]) // size], [place, place + len(data[name])]
        header[f"layer.lora_{name}.weight"] = {
            "dtype": dtype, "shape": shape, "data_offsets": offsets
        }
        place = offsets[1]
    text = json.dumps(header).encode()
    content = b"".join(data[name] for name in names)
    final.write_bytes(len(text).to_bytes(8, "little") + text + content)
"""


def training_as(context: Context, code: str, *options: str) -> None:
    """Have the trainer of a plan be this Python, by default without its packages."""
    trainer = Command((sys.executable, *(options or ("-S", "-c")), WRITES + code))
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
    training_as(context, "write()")
    context.writer = writer = Noting()
    trained(context.run_dir, 0.0, 2.0, 2.5)
    TRAIN.run(context)
    logged = {(point.key, point.step): point.value for point in writer.points}
    assert logged["time/step_seconds", 2] == 2.0
    assert logged["time/samples_per_second", 2] == pytest.approx(5 / 3 / 2.0)
    assert logged["time/samples_per_second", 3] == pytest.approx(5 / 3 / 0.5)
    assert logged["time/seconds_left", 3] == pytest.approx(9 * 1.25)
    assert (context.run_dir / "lora.safetensors").read_bytes().endswith(b"trained!others!!")


# The run's LoRA is the trainer's newest, a file of its own name and no link to another, also in
# place of what an earlier attempt left there, whether the trainer writes a new file or into the old
# one; a trainer that ends well and writes none is reported with its log.
@pytest.mark.parametrize("anew", ["final.unlink(missing_ok=True)", "pass"])
def test_the_newest_lora_is_taken(tmp_path: Path, anew: str) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    place = context.run_dir / "lora.safetensors"
    for content in (b"first...", b"second.."):
        training_as(context, f"{anew}\nwrite(up={content!r})")
        TRAIN.run(context)
        assert content in place.read_bytes()
        assert not place.is_symlink()
    training_as(context, "final.unlink()")
    log = context.log("train")
    with pytest.raises(StageError, match=rf"ended without writing .* \(log: {log}\)$"):
        TRAIN.run(context)
    assert b"second.." in place.read_bytes()


# That the file can't be put there is reported as such, whatever warnings the trainer printed.
def test_a_lora_that_cant_be_kept(tmp_path: Path) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    (context.run_dir / "lora.safetensors").mkdir(parents=True)
    warning = "import traceback\ntry: 1 / 0\nexcept ArithmeticError: traceback.print_exc()"
    training_as(context, f"write()\n{warning}")
    with pytest.raises(StageError, match=r"^cp: .*lora\.safetensors.* \(exit code 1; log: "):
        TRAIN.run(context)


# The largest finite values and the smallest, and those that are not, in each dtype that LoRAs have.
FINITE = {
    "F64": ("pack('<d', 1.7e308)", "pack('<d', -1.7e308)", "pack('<d', 5e-324)"),
    "F32": ("pack('<f', 3.4e38)", "pack('<f', -3.4e38)", "pack('<f', 1e-45)"),
    "F16": ("pack('<e', 65504)", "pack('<e', -65504)", "pack('<e', 6e-8)"),
    "BF16": ("pack('<f', 3.3e38)[2:]", "pack('<f', -3.3e38)[2:]", "pack('<H', 1)"),
}
NUMBERS = {
    "F64": "pack('<d', {})",
    "F32": "pack('<f', {})",
    "F16": "pack('<e', {})",
    "BF16": "pack('<f', {})[2:]",
}
NOT_FINITE = ("float('nan')", "float('inf')", "-float('inf')")


def end_of(context: Context, code: str) -> str | None:
    """What the stage reports of a trainer that ends well; None if it takes the file."""
    training_as(context, code)
    try:
        TRAIN.run(context)
    except StageError as error:
        return str(error)
    return None


# A value that is not finite fails the training, in each dtype and at the end of a large tensor too;
# the largest and the smallest finite ones do not. What a failed one wrote is not the run's LoRA.
def test_values_that_are_not_finite(tmp_path: Path) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    for dtype, values in FINITE.items():
        for value in values:
            assert end_of(context, f"write({dtype!r}, down={value})") is None, (dtype, value)
    place = context.run_dir / "lora.safetensors"
    place.unlink()
    for dtype, number in NUMBERS.items():
        for value in (number.format(value) for value in NOT_FINITE):
            said = end_of(context, f"write({dtype!r}, down=bytes(16_000_000) + {value})")
            assert said is not None, (dtype, value)
            assert "is no good: 1 of its 2 tensors have values that are not finite" in said
            assert said.endswith(f"layer.lora_down.weight the first (log: {context.log('train')})")
    assert not place.exists()


# A LoRA of fewer steps than planned, without tensors, cut, no LoRA at all or of zeros fails it, in
# a line that says so; more steps, or a file that doesn't tell, do not.
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("write(steps=9)", "it was trained for 9 of 10 steps"),
        ("write(steps=10)", None),
        ("write(steps=11)", None),
        ("write(names=())", "it has no tensors"),
        (
            "write(); final.write_bytes(final.read_bytes()[:-3])",
            "file is cut, 3 bytes are missing",
        ),
        ("final.write_bytes(b'trained')", "it is not a safetensors file (7 bytes)"),
        ("write('F32', up=bytes(7) + b'\\x80')", "it changes nothing: every up matrix is zero"),
        ("write('BF16', up=bytes(8))", "it changes nothing: every up matrix is zero"),
        ("write('BF16', up=bytes(7) + b'\\x01')", None),
        ("write(names=('down',), down=bytes(8))", None),
    ],
)
def test_a_lora_that_is_no_good(tmp_path: Path, code: str, expected: str | None) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    assert context.plan.steps == 10
    said = end_of(context, code)
    assert said == expected or (expected is not None and said is not None and expected in said)
    assert (context.run_dir / "lora.safetensors").exists() == (expected is None)


LOSSES = """
import os, time
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
writer = EventFileWriter("tensorboard")
for step, loss in enumerate(map(float, "{}".split()), 1):
    values = [Summary.Value(tag="loss/current", simple_value=loss)]
    writer.add_event(Event(wall_time=1000 + step, step=step, summary=Summary(value=values)))
writer.flush()
print(os.getpid(), flush=True)
"""


# A loss that is not finite for several steps ends the trainer and all that it started, with one
# line of what to try that fits the options; so it does when the trainer has ended meanwhile.
@pytest.mark.parametrize("then", ["time.sleep(600)", "write()"])
def test_a_lost_loss_ends_the_run(tmp_path: Path, then: str) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    options = ("engine=diffusers", "optimizer.learning_rate=1e-3", "network.alpha=64")
    context = context_of(tmp_path / "out", media, *options, console=silent)
    training_as(context, LOSSES.format("0.5 nan inf nan nan nan") + then, "-c")
    with pytest.raises(StageError) as caught:
        TRAIN.run(context)
    log = context.log("train")
    assert str(caught.value) == (
        "the loss was not finite (NaN or infinite) for 5 steps in a row, from step 2 on. What "
        "helps, the most likely first: optimizer.learning_rate=0.0002 instead of 0.001, "
        f"network.alpha=32 instead of 64, scheduler.warmup_steps=100 (log: {log})"
    )
    assert not psutil.pid_exists(int(log.read_text().split()[-1]))
    assert not (context.run_dir / "lora.safetensors").exists()


# Four such steps do not.
def test_a_few_such_steps_end_nothing(tmp_path: Path) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    training_as(context, LOSSES.format("0.5 nan nan nan nan 0.5 nan") + "write()", "-c")
    TRAIN.run(context)
    assert (context.run_dir / "lora.safetensors").is_file()


# A trainer that does nothing for as long as stages.timeout_minutes says is ended with all that it
# started, and what it saved is kept; without that option it goes on.
def test_a_stuck_trainer(tmp_path: Path) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    waits = "import os, time; write(); print(os.getpid(), flush=True); time.sleep({})"
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    assert end_of(context, waits.format(2.5)) is None
    options = ("engine=diffusers", "stages.timeout_minutes=0.02")
    context = context_of(tmp_path / "out", media, *options, console=silent)
    said = end_of(context, waits.format(600))
    log = context.log("train")
    process = log.read_text().split()[-1]
    assert said is not None and said.startswith("it was ended after 1 second without any progress")
    assert said.endswith(f"the last line of its log is: {process} (log: {log})")
    assert not psutil.pid_exists(int(process))
    assert (context.run_dir / "checkpoints/lora.safetensors").is_file()
    assert not (context.run_dir / "lora.safetensors").exists()


# The limit is that of other stages' commands too.
@pytest.mark.parametrize("name", ["weights", "convert", "evaluate"])
def test_any_stuck_stage(tmp_path: Path, name: str) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    options = ("engine=diffusers", "stages.timeout_minutes=0.02")
    context = context_of(tmp_path / "out", media, *options, console=silent)
    waits = Command((sys.executable, "-S", "-c", "import time; time.sleep(600)"))
    planned = tuple(replace(stage, commands=(waits,)) for stage in context.plan.stages)
    context.plan = replace(context.plan, stages=planned)
    [stage] = (stage for stage in STAGES if stage.name == name)
    with pytest.raises(StageError, match=r"^it was ended after 1 second without any progress"):
        stage.run(context)


# A trainer that runs out of memory is reported with what helps in training, and its log.
def test_a_trainer_out_of_memory(tmp_path: Path) -> None:
    media, silent = pictures(tmp_path / "media", 1), Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, "engine=diffusers", console=silent)
    said = end_of(context, "raise RuntimeError('CUDA out of memory. ' + 'Tried all. ' * 60)")
    assert said is not None and said.startswith("RuntimeError: CUDA out of memory. Tried all. ")
    assert "Tried all. What helps, the most likely first: " in said
    assert said.endswith(f"(nvidia-smi) (exit code 1; log: {context.log('train')})")
    said = end_of(context, "import os; os.kill(os.getpid(), 9)")
    assert said is not None and said.startswith("the program was ended by SIGKILL. What helps")


# Previews are expected after the last step of every so many epochs, a short last one too; what
# comes between is no step.
def test_previews_have_their_steps(tmp_path: Path) -> None:
    media = pictures(tmp_path / "media", 5)
    options = ["engine=diffusers", "sampling=prompts", "sampling.prompts=[a]"]
    options += ["training.max_steps=13", "sampling.every_epochs=2", "sampling.width=64"]
    silent = Console.for_stream(io.StringIO())
    context = context_of(tmp_path / "out", media, *options, console=silent)
    plan, config = context.plan, context.inputs.config
    assert (plan.steps_per_epoch, plan.epochs) == (5, 3)
    assert preview_steps(plan, config) == (10,)
    config.sampling.every_epochs = 3
    assert preview_steps(plan, config) == (13,)
    config.sampling.name = "none"
    assert preview_steps(plan, config) == ()
    config.sampling.name, config.sampling.every_epochs = "prompts", 1
    training_as(context, "write()")
    context.writer = writer = Noting()
    trained(context.run_dir, 0.0, 1.0, 2.0, 3.0, 4.0, 25.0)
    TRAIN.run(context)
    logged = {(point.key, point.step): point.value for point in writer.points}
    assert logged["time/preview_seconds", 6] == 20.0
    assert ("time/step_seconds", 6) not in logged
    assert logged["time/seconds_left", 6] == 7.0 + 2 * 20.0
