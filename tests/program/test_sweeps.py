"""Sweeps by the real program, their jobs in one process or in others, and no password of theirs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TOP, Finished
from hydra._internal.grammar.utils import escape_special_characters
from in_process import program_here
from omegaconf import OmegaConf

from runner.cli.literal import quote
from runner.config.composed import Composed
from runner.pipeline import executor
from runner.tracking.client import connect

LAUNCHERS = ["basic", "processes"]
PYTHON_PATH = os.pathsep.join([str(TOP), str(TOP / "tests" / "launcher")])
BASE = ["-m", "experiment=rehearsal", "dataset=sample"]
# A job that has a folder, files and an MLflow run, and trains nothing.
NO_WORK = "stages.skip=[latents,text,train,convert,evaluate]"


@dataclass(frozen=True)
class Swept:
    """A sweep as its files and MLflow have it."""

    folder: Path

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        files = sorted((self.folder / "jobs").glob("*.json"))
        return {file.stem: json.loads(file.read_text()) for file in files}

    @property
    def codes(self) -> list[int | None]:
        return [job["exit_code"] for job in self.jobs.values()]

    def mlflow(self) -> tuple[str, list[str]]:
        """The status of the parent, and those of its children."""
        parent = json.loads((self.folder / "parent.json").read_text())
        client = connect(parent["uri"])
        run = client.get_run(parent["run_id"])
        found = client.search_runs([run.info.experiment_id])
        children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent["run_id"]]
        return run.info.status, sorted(child.info.status for child in children)


def start(cwd: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=300)
    return Finished(process.returncode, out, err)


def run(cwd: Path, *arguments: str, **env: str) -> Finished:
    return finish(start(cwd, *arguments, **env))


def sweeps(cwd: Path) -> list[Swept]:
    return [Swept(file.parent) for file in sorted(cwd.glob("outputs/sweeps/*/*/sweep.json"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose cache has all that the tiny model's training on the sample needs."""
    cwd = tmp_path_factory.mktemp("sweeps")
    done = run(cwd, *BASE[1:], "stages.skip=[train,convert,evaluate]", "tracking=none")
    assert done.code == 0, done.err
    return cwd


# The exit code, the records, the parent's end and the address that is printed are the same whether
# jobs run in the sweep's process or in others; one that is refused does not stop the others.
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_ends_as_its_jobs_did(made: Path, launcher: str) -> None:
    before = len(sweeps(made))
    done = run(made, *BASE, f"hydra/launcher={launcher}", NO_WORK, "network.rank=0,2")
    assert done.code == 2, done.err
    assert "error: network.rank=0 is too small" in done.err
    *_, swept_keys = sweeps(made)
    assert len(sweeps(made)) == before + 1
    assert swept_keys.codes == [2, 0]
    assert "network.rank=0 is too small" in swept_keys.jobs["0"]["error"]
    assert (Path(swept_keys.jobs["1"]["run_folder"]) / "run.json").is_file()
    assert swept_keys.mlflow() == ("FAILED", ["FINISHED"])
    words = done.out.split("sweep ended: ")[1]
    assert words.startswith(f"1 of 2 jobs finished, in {swept_keys.folder.relative_to(made)}\n")
    assert "job 0 (network.rank=0) ended with exit code 2" in words
    assert words.rstrip().endswith("-m runner.ui")


# All well is 0 and FINISHED, in either way.
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_that_went_well(made: Path, launcher: str) -> None:
    done = run(made, *BASE, f"hydra/launcher={launcher}", NO_WORK, "network.rank=2,4")
    assert done.code == 0, done.err
    *_, swept_keys = sweeps(made)
    assert swept_keys.codes == [0, 0]
    assert swept_keys.mlflow() == ("FINISHED", ["FINISHED", "FINISHED"])


# A text is the same in each job's config, whatever process it runs in, and in MLflow: the values of
# a sweep, between commas, and others. What was typed can be read beside each job.
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_texts_arrive(made: Path, launcher: str) -> None:
    texts = {
        "dataset.trigger_word": "1_000",
        "metadata.license": "5e10123",
        "metadata.author": "it's ${x} \\${y",
        "metadata.title": "foo bar [007",
    }
    words = [f"{key}={text}" for key, text in texts.items()]
    swept_texts = ["name=2025_11_25,it's,'a,b'", "metadata.tags=[2024_01,1e3]"]
    done = run(made, *BASE, f"hydra/launcher={launcher}", NO_WORK, *swept_texts, *words)
    assert done.code == 0, done.err
    jobs = sweeps(made)[-1].jobs
    names = ["2025_11_25", "it's", "a,b"]
    for number, name in enumerate(names):
        job = jobs[str(number)]
        assert f"\njob {number} (name={quote(name)})\n" in done.out
        config = OmegaConf.load(Path(job["run_folder"]) / "config.yaml")
        for key, text in {**texts, "name": name}.items():
            assert OmegaConf.select(config, key) == text
        assert config.metadata.tags == ["2024_01", "1e3"]
        client = connect(f"sqlite:///{made}/outputs/mlflow.db")
        recorded = client.get_run(job["mlflow_run_id"])
        params = recorded.data.params
        assert {key: params[key] for key in texts} == texts
        assert params["metadata.tags"] == "[2024_01, 1e3]"
        assert recorded.info.run_name == f"{name} name={name}"


def begin_long(cwd: Path, launcher: str, epochs: str) -> tuple[subprocess.Popen[str], Swept]:
    before = {swept_keys.folder for swept_keys in sweeps(cwd)}
    options = [f"training.epochs={epochs}", "training.save_every_epochs=100000"]
    process = start(cwd, *BASE, f"hydra/launcher={launcher}", *options)
    deadline = time.monotonic() + 120
    while not (new := [s for s in sweeps(cwd) if s.folder not in before]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    return process, new[0]


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def trains(swept_keys: Swept, number: str) -> bool:
    folder = swept_keys.jobs.get(number, {}).get("run_folder")
    return bool(folder and list(Path(folder).rglob("events.*")))


# A job that is killed outright can write nothing down: the sweep says so, ends its MLflow run and
# tells by its exit code; the other job is as it was.
def test_a_job_that_is_killed(made: Path) -> None:
    process, swept_keys = begin_long(made, "processes", "1,100000")
    wait_for(
        process, lambda: trains(swept_keys, "1") and swept_keys.jobs["0"]["exit_code"] is not None
    )
    os.kill(swept_keys.jobs["1"]["pid"], signal.SIGKILL)
    done = finish(process)
    assert done.code == 137
    assert "error: The launcher ended the sweep: RuntimeError: a worker died" in done.err
    assert "error: job 1 (training.epochs=100000) in outputs/runs/" in done.err
    assert "was killed before it could record how it ended." in done.err
    assert swept_keys.codes == [0, None]
    assert swept_keys.mlflow() == ("KILLED", ["FINISHED", "KILLED"])


# Ctrl-C, which reaches every process, and SIGTERM to the sweep's alone end all its jobs: nothing
# runs on, and parent and children are KILLED.
@pytest.mark.parametrize(
    ("launcher", "number", "to_all"),
    [
        ("basic", signal.SIGINT, True),
        ("processes", signal.SIGINT, True),
        ("processes", signal.SIGTERM, False),
    ],
)
def test_a_signal_ends_the_sweep(
    made: Path, launcher: str, number: signal.Signals, to_all: bool
) -> None:
    import psutil

    process, swept_keys = begin_long(made, launcher, "90000,100000")
    working = ["0"] if launcher == "basic" else ["0", "1"]
    wait_for(process, lambda: all(trains(swept_keys, job) for job in working))
    children = psutil.Process(process.pid).children(recursive=True)
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    done = finish(process)
    assert done.code == 128 + number, done.err
    assert swept_keys.codes == [128 + number] * len(working)
    assert swept_keys.mlflow() == ("KILLED", ["KILLED"] * len(working))
    assert ("1 job of the sweep never started" in done.err) == (launcher == "basic")
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)


# A sweep whose values Hydra refuses, or that is a dry run, leaves nothing in its folder.
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("arguments", "code"), [(["network.rank=2,x"], 2), (["network.rank=0,2", "dry_run=true"], 2)]
)
def test_nothing_is_left(tmp_path: Path, launcher: str, arguments: list[str], code: int) -> None:
    done = run(tmp_path, *BASE, f"hydra/launcher={launcher}", *arguments, TMPDIR=str(tmp_path))
    assert done.code == code, done.err
    assert done.err.startswith("error: network.rank=") and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Where the folder can't be made, one line says so before anything runs.
def test_a_sweep_without_a_folder(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    done = run(tmp_path, *BASE, "network.rank=2,4")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "name another output_dir" in done.err


# Whatever stands between these two in an escaped, quoted or encoded form, they are found.
PARTS = ("gEh3iMnI5", "qX9vLk2wZ")
PASSWORD = PARTS[0] + r""":a/s@s,w'o"r\d (x)[y]{z}=%41 é<t>&;|#!~`^*?""" + PARTS[1]
TOKEN = "hf_" + "".join(PARTS) + "abc"


def address(port: int, *, encoded: bool = False) -> str:
    """An address with the password: as MLflow takes it, or as a person may type it."""
    password = PARTS[0] + urllib.parse.quote(PASSWORD, safe="'") + PARTS[1]
    return f"http://ann:{password if encoded else PASSWORD}@localhost:{port}"


def assert_hidden(done: Finished, *folders: Path) -> None:
    """No part of the password is in what was printed, or in any byte below the folders."""
    for part in PARTS:
        assert part not in done.out + done.err
        for file in (file for folder in folders for file in folder.rglob("*")):
            if file.is_file() and file.name != "mine.yaml":
                assert part.encode() not in file.read_bytes(), file


def in_a_file(cwd: Path, place: str) -> list[str]:
    (cwd / "conf" / "tracking").mkdir(parents=True)
    text = f"defaults: [server]\nuri: {json.dumps(place)}\n"
    (cwd / "conf" / "tracking" / "mine.yaml").write_text(text)
    return ["tracking=mine", "--config-dir=conf"]


def escaped(place: str) -> str:
    """An address as Hydra itself writes it, without what its grammar has no escape for."""
    return escape_special_characters(re.sub("['~]", "", place))


# How an address gets into a config: words of the command line for a folder and an address.
SPELLINGS: dict[str, Callable[[Path, str], list[str]]] = {
    "typed": lambda _, place: [f"tracking.uri={place}"],
    "quoted": lambda _, place: [f"tracking.uri={quote(place)}"],
    "two quotes": lambda _, place: [f"tracking.uri={quote(place, chr(34))}"],
    "escaped": lambda _, place: [
        f"tracking.uri={escape_special_characters(place.replace(chr(39), ''))}"
    ],
    "option's variable": lambda *_: ["tracking.uri=${oc.env:ADDRESS}"],
    "part's variable": lambda *_: [
        "tracking.uri=${oc.env:BEFORE}${oc.env:PASSWORD}${oc.env:AFTER}"
    ],
    "MLflow's variable": lambda *_: [],
    "file": in_a_file,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port and the folder of an MLflow server."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    places = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db"]
    places += [f"--artifacts-destination={folder}/artifacts"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *places, f"--port={port}", "--workers=1"],
        cwd=folder,
        env={
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.3)
        yield port, folder
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# A password, whatever characters it has and wherever it comes from, is in no file of a sweep, in
# nothing of the MLflow store and in nothing that is printed, by the runner, by Hydra or a launcher.
# The sweep's parent is found and ended there.
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_password_in_a_sweep(
    made: Path, server: tuple[int, Path], tmp_path: Path, spelling: str, launcher: str
) -> None:
    port, store = server
    place = address(port, encoded=True)
    before, password, after = place.partition(place[len("http://ann:") : place.rindex("@")])
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "cache").symlink_to(made / "outputs" / "cache")
    done = run(
        tmp_path,
        *BASE,
        *(f"hydra/launcher={launcher}", "hydra/job_logging=default", "hydra.verbose=[hydra]"),
        *(NO_WORK, "network.rank=0,2", "tracking=server"),
        *SPELLINGS[spelling](tmp_path, place),
        **{"MLFLOW_TRACKING_URI" if spelling == "MLflow's variable" else "ADDRESS": place},
        **{"BEFORE": before, "PASSWORD": password, "AFTER": after},
    )
    assert done.code == 2, done.err
    assert_hidden(done, tmp_path, store)
    [swept_keys] = sweeps(tmp_path)
    assert swept_keys.codes == [2, 0], done.err
    assert (Path(swept_keys.jobs["1"]["run_folder"]) / "overrides.txt").is_file()
    assert f"http://ann:***@localhost:{port}/#/experiments/" in done.out.splitlines()[-1]
    parent = json.loads((swept_keys.folder / "parent.json").read_text())["run_id"]
    assert connect(f"http://127.0.0.1:{port}").get_run(parent).info.status == "FAILED"


# Nor is it in an error: an interpolation that fails, a value that can't be read, a server that is
# away, a wrong option; in one run and in a sweep.
@pytest.mark.parametrize("sweep", [[], ["-m", "network.rank=2,4"]], ids=["single", "sweep"])
@pytest.mark.parametrize(
    "wrong",
    [
        ["training.epochs=${oc.env:NOPE}"],
        ["training.epochs=x"],
        ["tracking=server"],
        ["training.epoch=1"],
        [f"tracking.uri={address(1)}"],
        [f"tracking.uri={escape_special_characters(address(1))}"],
    ],
    ids=["interpolation", "value", "server", "option", "grammar", "escapes"],
)
def test_no_password_in_an_error(tmp_path: Path, wrong: list[str], sweep: list[str]) -> None:
    done = run(tmp_path, *sweep, *BASE[1:], f"tracking.uri={quote(address(1))}", *wrong)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err and "Error executing job" not in done.err
    assert_hidden(done, tmp_path)


# A mistake of the runner's own is a line and a file with its whole traceback, without what is
# secret in it, and one job's does not stop the others.
@pytest.mark.parametrize("sweep", [[], ["-m", "network.rank=2,4"]], ids=["single", "sweep"])
def test_no_password_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: list[str]
) -> None:
    def fails(composed: Composed, *_: object) -> None:
        try:
            raise KeyError(composed.config.tracking.uri)
        except KeyError as error:
            raise RuntimeError(f"at {composed.config.tracking.uri!r}") from error

    monkeypatch.setattr(executor, "prepare", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = [*sweep, *BASE[1:], f"tracking.uri={quote(address(1))}", "tracking=server"]
    done = program_here(*words, cwd=tmp_path)
    assert done.code == 1
    count = 2 if sweep else 1
    said = "RuntimeError: at 'http://ann:***@localhost:1'"
    assert done.err.count(f"error: unexpected {said}") == done.err.count("\n") == count
    logs = [log.read_text() for log in tmp_path.glob("runner-*.log")]
    assert len(logs) == count
    assert all(log.count("Traceback (most") == 2 and said in log for log in logs)
    assert_hidden(done, tmp_path)


# What Hydra prints of a config at request has no password either.
@pytest.mark.parametrize(
    "flags", [["--cfg", "all"], ["--cfg", "job", "--resolve"], ["--info", "all"]], ids=" ".join
)
@pytest.mark.parametrize("spelling", ["typed", "file", "option's variable"])
def test_no_password_in_a_printed_config(tmp_path: Path, flags: list[str], spelling: str) -> None:
    arguments = [f"name={TOKEN}", *SPELLINGS[spelling](tmp_path, address(1))]
    done = run(tmp_path, *BASE[1:], *arguments, *flags, ADDRESS=address(1))
    assert done.code == 0, done.err
    assert "uri: http" in done.out or "uri: ${oc.env:ADDRESS}" in done.out or "--info" in flags
    assert_hidden(done, tmp_path)
