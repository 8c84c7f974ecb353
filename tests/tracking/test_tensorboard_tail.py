from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from runner.tracking.metrics import LossGuard, Point, StepTimer, clean_metric_name, with_speed
from runner.tracking.tensorboard_tail import TensorBoardTail


def record(key: str, step: int, *, wall_time: float = 1000.0, **value: Any) -> bytes:
    """One framed event as it stands in a file."""
    out = io.BytesIO()
    summary = Summary(value=[Summary.Value(tag=key, **value)])
    event = Event(wall_time=wall_time, step=step, summary=summary)
    RecordWriter(out).write(event.SerializeToString())
    return out.getvalue()


def scalar(key: str, step: int, value: float, wall_time: float = 1000.0) -> bytes:
    return record(key, step, simple_value=value, wall_time=wall_time)


def append(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)


def event_file(folder: Path, name: str = "1") -> Path:
    return folder / "2026" / "network_train" / f"events.out.tfevents.{name}"


# Each point is given once, in both forms a scalar has, and nothing else is taken for a scalar.
def test_points_come_once_in_either_form(tmp_path: Path) -> None:
    folder = tmp_path / "tensor [board]"
    tail = TensorBoardTail(folder)
    assert tail.read() == []  # the folder does not exist yet
    file = event_file(folder)
    append(file, scalar("loss/current", 1, 0.5, wall_time=1234.5678))
    append(file, record("lr/unet", 1, tensor=make_tensor_proto(0.25, dtype="float64")))
    append(file, record("text", 1, tensor=make_tensor_proto("words")))
    append(file, record("histogram", 1, tensor=make_tensor_proto([[1.0, 2.0, 3.0]])))
    assert tail.read() == [
        Point("loss/current", 0.5, 1, 1234568),
        Point("lr/unet", 0.25, 1, 1000000),
    ]
    assert tail.read() == []
    append(file, scalar("loss/current", 2, 0.25))
    assert [point.step for point in tail.read()] == [2]
    assert tail.unread_bytes() == 0


# A record that is written in pieces is given once it is whole, wherever it was cut.
def test_a_cut_record_waits_until_it_is_whole(tmp_path: Path) -> None:
    data = scalar("loss/current", 1, 0.5)
    for cut in range(1, len(data)):
        file = event_file(tmp_path / str(cut))
        tail = TensorBoardTail(tmp_path / str(cut))
        append(file, data[:cut])
        assert tail.read() == []
        assert tail.unread_bytes() == cut
        append(file, data[cut:])
        assert [point.value for point in tail.read()] == [0.5]
        assert tail.unread_bytes() == 0


# Files that appear later, in any folder below, are followed too (a resumed trainer writes one).
def test_new_files_are_found(tmp_path: Path) -> None:
    tail = TensorBoardTail(tmp_path)
    append(event_file(tmp_path, "1"), scalar("loss/current", 1, 0.5))
    assert len(tail.read()) == 1
    append(event_file(tmp_path / "deeper", "2"), scalar("loss/current", 2, 0.25))
    assert [point.step for point in tail.read()] == [2]


# Corrupt bytes hide what follows them in their file; that is counted, and other files go on.
@pytest.mark.parametrize("position", [3, 9, 20, -2], ids=["length", "length crc", "data", "crc"])
def test_corrupt_bytes_are_counted(tmp_path: Path, position: int) -> None:
    bad = bytearray(scalar("loss/current", 2, 0.25))
    bad[position] ^= 0xFF
    rest = scalar("loss/current", 3, 0.125)
    append(event_file(tmp_path, "1"), scalar("loss/current", 1, 0.5) + bytes(bad) + rest)
    append(event_file(tmp_path, "2"), scalar("loss/epoch", 1, 0.5))
    tail = TensorBoardTail(tmp_path)
    assert [point.key for point in tail.read()] == ["loss/current", "loss/epoch"]
    assert tail.read() == []
    assert tail.unread_bytes() == len(bad) + len(rest)


def loss(step: int, milliseconds: int) -> Point:
    return Point("loss/current", 0.5, step, milliseconds)


# Step time is wall time between steps, per step, whatever the batches the points come in; a
# restarted step count or a clock set back gives none.
def test_step_time_goes_on_from_batch_to_batch() -> None:
    timer = StepTimer()
    first = with_speed([loss(1, 1000), Point("lr/unet", 0.1, 1, 1500)], timer)
    assert [point.key for point in first] == ["loss/current", "lr/unet"]
    second = with_speed([loss(2, 3000), loss(6, 5000), loss(1, 6000), loss(2, 5500)], timer)
    assert second[4:] == [
        Point("time/step_seconds", 2.0, 2, 3000),
        Point("time/step_seconds", 0.5, 6, 5000),
    ]


# With gradient accumulation a step is logged several times: its time is the whole step's, not its
# last batch's; and the time left goes by the usual step, not by one that drew previews.
def test_speed_of_accumulated_steps() -> None:
    timer = StepTimer(samples=4, steps=10)
    clock = [(0, 500), (1, 1000), (1, 1500), (2, 2000), (2, 2500), (3, 3000), (3, 3500), (4, 60000)]
    values = {
        (point.key, point.step): point.value for point in timer.derive(loss(*c) for c in clock)
    }
    assert [values["time/step_seconds", step] for step in (2, 3, 4)] == [1.0, 1.0, 57.0]
    assert values["time/samples_per_second", 3] == 4.0
    assert values["time/seconds_left", 3] == 7.0
    assert values["time/seconds_left", 4] == 6.0
    assert ("time/step_seconds", 1) not in values


# Where previews are made between two steps, the time beyond a usual step is theirs and no step's;
# the time left has them in it once it is known how long they take, those after the last step too.
def test_previews_are_no_steps() -> None:
    timer = StepTimer(samples=4, steps=9, previews_after=(3, 6, 9))
    clock = [(1, 0), (2, 1000), (3, 2000), (4, 33000), (5, 34000), (6, 35000), (7, 76000)]
    values = {
        (point.key, point.step): point.value for point in timer.derive(loss(*c) for c in clock)
    }
    steps = {step: value for (key, step), value in values.items() if key == "time/step_seconds"}
    assert steps == {2: 1.0, 3: 1.0, 5: 1.0, 6: 1.0}
    assert {values["time/samples_per_second", step] for step in steps} == {4.0}
    assert ("time/samples_per_second", 4) not in values
    previews = {key[1]: value for key, value in values.items() if "preview" in key[0]}
    assert previews == {4: 30.0, 7: 40.0}
    left = {step: value for (key, step), value in values.items() if key == "time/seconds_left"}
    assert left == {2: 7.0, 3: 6.0, 4: 5.0 + 60, 5: 4.0 + 60, 6: 3.0 + 60, 7: 2.0 + 35}


# Previews after each step leave no step to time; what remains is still told.
def test_previews_after_each_step() -> None:
    timer = StepTimer(steps=4, previews_after=(1, 2, 3, 4))
    values = {(p.key, p.step): p.value for p in timer.derive([loss(1, 0), loss(2, 9000)])}
    assert values == {("time/preview_seconds", 2): 9.0, ("time/seconds_left", 2): 27.0}


# Five steps in a row without a finite loss end a training, four do not; a step that is logged again
# counts once, and a finite loss begins anew.
def test_a_lost_loss() -> None:
    guard, nan = LossGuard(), math.nan
    losses = [(1, nan), (1, nan), (2, math.inf), (3, nan), (4, nan), (4, nan), (5, 0.5), (6, nan)]
    losses += [(7, nan), (8, nan), (9, nan)]
    assert not any(guard.add(step, value) for step, value in losses)
    assert guard.add(10, -math.inf) and guard.failed_from == 6
    assert guard.add(11, 0.5) and "for 5 steps in a row, from step 6 on" in guard.message


# Every cleaned name passes MLflow's own check, distinct long names stay distinct, and good
# names stay as they are.
def test_cleaned_names_pass_mlflows_check() -> None:
    from mlflow.utils.validation import _validate_metric_name

    good = ["loss/current", "time/step_seconds", "a b-c.d:e"]
    bad = ["lr/d*lr/unet", "", "/a//b/", "../x", "..", ".", "a/../b", "a/./b", "ü(%)", "x" * 300]
    assert [clean_metric_name(name) for name in good] == good
    for name in good + bad:
        _validate_metric_name(clean_metric_name(name))
    assert clean_metric_name("lr/d*lr/unet") == "lr/d_lr/unet"
    assert clean_metric_name("x" * 300) != clean_metric_name("x" * 301)
