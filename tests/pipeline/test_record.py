"""What is written down of a run when things go wrong: its end, and no secret."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import fake_facts, fake_item
from in_process import composed
from other_processes import pictures
from whole_run import Stages, carry_out, run_folder_of

from runner.core.console import Console
from runner.core.errors import StageError
from runner.core.process import Stopped
from runner.pipeline import record
from runner.pipeline.record import code_version, parameters
from runner.tracking.mlflow_run import NullWriter

if TYPE_CHECKING:
    from runner.pipeline.context import Context


class Writer(NullWriter):
    """Remembers what MLflow would show."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def set_tags(self, tags: Any) -> None:
        self.calls.append(dict(tags))

    def finish(self, status: Any) -> None:
        self.calls.append(status)


def ends(
    tmp_path: Path, out: io.StringIO, writer: Writer, why: BaseException, said: bytes = b""
) -> Path:
    """A run whose training says something and ends so, as the program shows it; its folder."""

    def train(context: Context) -> None:
        log = context.log("train")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(said)
        raise why

    media, outputs = pictures(tmp_path / "media", 2), tmp_path / "out"
    console = Console.for_stream(out)
    stages: Stages = dict.fromkeys(("dataset", "latents", "text"), lambda _: None)
    with pytest.raises((type(why), StageError)) as caught:
        carry_out(console, outputs, media, stages={**stages, "train": train}, writer=writer)
    if isinstance(caught.value, StageError):
        console.error(str(caught.value))
    return run_folder_of(outputs)


# A full disk names no file when it is written to, so the run's folder is reported.
@pytest.mark.parametrize(
    ("why", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: {folder}"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "No such file: a.png"),
    ],
)
def test_a_full_disk_is_reported_with_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], why: OSError, expected: str
) -> None:
    folder = ends(tmp_path, io.StringIO(), Writer(), why)
    line = f"stage train failed: {expected.format(folder=folder)}"
    assert capsys.readouterr().err == f"error: {line}\n"
    assert json.loads((folder / "run.json").read_text())["error"] == line


# When the disk is full while a run fails, MLflow still has its end, and the trainer's error is
# the one error reported; that run.json could not be written, and what MLflow lacks, comes after it.
def test_a_full_disk_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "write_text", full)
    out, writer = io.StringIO(), Writer()
    writer.problems.append("metrics were not sent")
    folder = ends(tmp_path, out, writer, StageError("OSError: it was full"))
    assert writer.calls[-2:] == [
        {"run.error": "stage train failed: OSError: it was full"},
        "FAILED",
    ]
    assert capsys.readouterr().err == "error: stage train failed: OSError: it was full\n"
    assert [line for line in out.getvalue().splitlines() if line.startswith("note:")] == [
        f"note: {folder / 'run.json'} could not be written (No space left on device)",
        "note: MLflow: metrics were not sent",
    ]


# How a run ended is in its folder and in MLflow: failed with why, or killed by which signal; and
# its files are there as they were at its beginning.
@pytest.mark.parametrize(
    ("why", "status", "expected"),
    [
        (StageError("CUDA out of memory"), "FAILED", "stage train failed: CUDA out of memory"),
        (Stopped(15), "KILLED", "ended by SIGTERM"),
        (ValueError("a bug"), "FAILED", "unexpected ValueError: a bug in "),
    ],
)
def test_the_end_of_a_run_is_written_down(
    tmp_path: Path, why: BaseException, status: str, expected: str
) -> None:
    writer = Writer()
    folder = ends(tmp_path, io.StringIO(), writer, why)
    written = json.loads((folder / "run.json").read_text())
    assert written["status"] == status
    assert written["error"].startswith(expected)
    assert written["stages"].keys() == {"weights", "dataset", "latents", "text", "train"}
    result = {"config.fingerprint": written["config_fingerprint"]}
    assert writer.calls == [result, {"run.error": written["error"]}, status]
    files = {"config.yaml", "overrides.txt", "dataset.toml", "train.toml", "commands.sh"}
    assert files < {file.name for file in folder.iterdir()}


# A secret that the trainer printed, in its log or as its last words, is in no file of the run's
# and not in what the program shows; the rest of the log is kept byte for byte.
def test_a_trainers_secrets_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = ("plainlookingvalue", "Zx9NothingLikeAToken")
    monkeypatch.setenv("HF_TOKEN", secrets[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secrets[1])
    said = "RuntimeError: 401 with {} for ann:{}@host"
    log = b"\xff raw\r\nsteps\r%b\nthe secret: a b\n"
    out, writer = io.StringIO(), Writer()
    why = said.format(*secrets)
    folder = ends(tmp_path, out, writer, StageError(why), log % why.encode())
    hidden = said.format("***", "***")
    assert capsys.readouterr().err == f"error: stage train failed: {hidden}\n"
    assert (folder / "logs" / "train.log").read_bytes() == log % hidden.encode()
    everything = [file.read_text("latin-1") for file in folder.rglob("*") if file.is_file()]
    shown = "".join([*everything, out.getvalue(), str(writer.calls)])
    assert hidden in shown and not any(secret in shown for secret in secrets)
    assert not list(folder.rglob("*.tmp"))


# A seed that was drawn is in the run's config and is the one that is trained with, so that the run
# can be made again; one that was given is kept.
@pytest.mark.parametrize("given", [-1, 7])
def test_a_drawn_seed_is_in_the_config(tmp_path: Path, given: int) -> None:
    from omegaconf import OmegaConf

    media, outputs = pictures(tmp_path / "media", 1), tmp_path / "out"
    skipped = "stages.skip=[dataset,latents,text,train,evaluate,convert]"
    console = Console.for_stream(io.StringIO())
    carry_out(console, outputs, media, skipped, f"training.seed={given}")
    folder = run_folder_of(outputs)
    written: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    seed = written["training"]["seed"]
    assert seed == tomllib.loads((folder / "train.toml").read_text())["seed"]
    assert seed == given if given >= 0 else 0 <= seed < 2**31


# A seed that was drawn is in MLflow too, in place of the wish for one.
def test_a_drawn_seed_is_a_parameter() -> None:
    asked = composed("engine=diffusers", "model=tiny", "training.seed=-1")
    drawn = dataclasses.replace(fake_facts(asked.config, [fake_item("a.jpg")]), seed=12345)
    assert parameters(asked, drawn)["training.seed"] == 12345


# A run tells the commit of the checkout that it was made with, and a mark when any file of that
# had been changed.
def test_a_modified_checkout_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    file = tmp_path / "code.py"
    file.write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "--quiet", "--message", "one")
    monkeypatch.setattr(record, "checkout", lambda: str(tmp_path))
    commit = git("rev-parse", "--short=12", "HEAD")
    assert code_version() == commit
    file.write_text("x = 2\n")
    assert code_version() == f"{commit}-dirty"
    git("commit", "--quiet", "--all", "--message", "two")
    assert code_version() == git("rev-parse", "--short=12", "HEAD") != commit
