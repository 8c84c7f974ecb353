"""What is written down of a run when things go wrong: its end, and no secret."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.core.console import Console
from runner.core.errors import StageError
from runner.pipeline import record
from runner.pipeline.executor import _named, _Run
from runner.pipeline.record import Recorder
from runner.tracking.mlflow_run import NullWriter


class Writer(NullWriter):
    """Remembers what MLflow would show."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def set_tags(self, tags: Any) -> None:
        self.told.append(dict(tags))

    def finish(self, status: Any) -> None:
        self.told.append(status)


def fails(folder: Path, out: io.StringIO, writer: Writer, why: str) -> Console:
    """A run whose only stage fails, as the program shows it; returns its console."""
    run: Any = object.__new__(_Run)
    run.console = Console.for_stream(out)
    run.plan = SimpleNamespace(name="a run")

    def stages(_context: object, recorder: Recorder) -> None:
        try:
            with _named("stage train", folder):
                raise StageError(why)
        finally:
            recorder.stage("train", 1.0)

    run._open = lambda _: Recorder(writer, folder, "f")
    run._begin = lambda *_: None
    run._stages = stages
    with pytest.raises(StageError) as caught:
        run._through(folder, None)
    run.console.error(str(caught.value))
    return run.console


# A full disk names no file when it is written to, so the run's folder is told.
def test_a_full_disk_is_told_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught, _named("stage dataset", tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"stage dataset failed: No space left on device: {tmp_path}"
    with pytest.raises(StageError) as caught, _named("stage dataset", tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file", "a.png")
    assert str(caught.value) == "stage dataset failed: No such file: a.png"


# A trainer that ends well and writes no LoRA is told with its log, as other failures are.
def test_a_missing_lora_names_the_log(tmp_path: Path) -> None:
    from runner.pipeline.stages.train import collect_lora

    with pytest.raises(StageError, match=rf"without writing .* \(log: {tmp_path}/logs/train.log"):
        collect_lora(tmp_path)


# When the disk is full while a run fails, MLflow still has its end, and the trainer's error is
# the one error told; that run.json could not be written, and what MLflow lacks, comes after it.
def test_a_full_disk_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "write_text", full)
    out, writer = io.StringIO(), Writer()
    writer.problems.append("metrics were not sent")
    fails(tmp_path, out, writer, "OSError: it was full")
    assert writer.told == [{"run.error": "stage train failed: OSError: it was full"}, "FAILED"]
    assert capsys.readouterr().err == "error: stage train failed: OSError: it was full\n"
    assert out.getvalue().splitlines() == [
        f"note: {tmp_path / 'run.json'} could not be written (No space left on device)",
        "note: MLflow: metrics were not sent",
    ]


# A secret that the trainer printed, in its log or as its last words, is in no file of the run's
# and not in what the program shows; the rest of the log is kept byte for byte.
def test_a_trainers_secrets_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = ("plainlookingvalue", "Zx9NothingLikeAToken")
    monkeypatch.setenv("HF_TOKEN", secrets[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secrets[1])
    log = tmp_path / "logs" / "train.log"
    log.parent.mkdir()
    said = "RuntimeError: 401 with {} for ann:{}@host"
    log.write_bytes(
        b"\xff raw\r\nsteps\r" + said.format(*secrets).encode() + b"\nthe secret: a b\n"
    )
    out, writer = io.StringIO(), Writer()
    fails(tmp_path, out, writer, said.format(*secrets))
    hidden = said.format("***", "***")
    assert capsys.readouterr().err == f"error: stage train failed: {hidden}\n"
    assert log.read_bytes() == b"\xff raw\r\nsteps\r" + hidden.encode() + b"\nthe secret: a b\n"
    everything = [file.read_text("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    shown = "".join([*everything, out.getvalue(), str(writer.told)])
    assert hidden in shown and not any(secret in shown for secret in secrets)
    assert {file.name for file in tmp_path.rglob("*")} == {"logs", "train.log", "run.json"}
