from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from runner.core.errors import UserError
from runner.tracking import mlflow_store
from runner.tracking.follower import MetricsFollower
from runner.tracking.metrics import Point
from runner.tracking.mlflow_run import NullWriter, RunWriter

if TYPE_CHECKING:
    from conftest_mlflow import Store

pytest_plugins = ["conftest_mlflow"]

Client = TypeVar("Client")


def start(store: Store, **options: Any) -> RunWriter:
    options = {"name": "a run", "params": {}, "tags": {}, **options}
    return RunWriter.start(store.uri, "tests", outputs=store.outputs, **options)


def start_with(store: Store, make: Callable[[Any], Client]) -> tuple[RunWriter, Client]:
    """A run that is written through a client of the test's, which has the true one inside."""
    run = store.client.get_run(start(store).run_id).info
    client: Any = make(store.client)
    return RunWriter(client, store.uri, run.run_id, run.experiment_id, store.outputs), client


def points(count: int, key: str = "loss/current") -> list[Point]:
    return [Point(key, 1.0 / step, step, 1_000_000 + 500 * step) for step in range(1, count + 1)]


SLOW_TRAINER = """
import sys, time
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
writer = EventFileWriter(sys.argv[1] + "/2026/network_train")
for step in range(1, 7):
    values = [Summary.Value(tag=key, simple_value=1 / step) for key in ("loss/current", "lr/d*lr")]
    writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    writer.flush()
    print(step, flush=True)
    time.sleep(0.4)
sys.stdin.readline()
"""


# Metrics are in MLflow while the trainer still runs, and all of them are once it has ended.
def test_metrics_appear_while_training_runs(store: Store, tmp_path: Path) -> None:
    writer = start(store)
    folder = tmp_path / "tensorboard"
    shown: list[Point] = []
    follower = MetricsFollower(folder, writer, interval=0.1, on_points=shown.extend).start()
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TRAINER, str(folder)], stdin=subprocess.PIPE
    ) as trainer:
        deadline = time.monotonic() + 30
        while len(store.points(writer.run_id, "loss/current")) < 2:
            assert time.monotonic() < deadline and trainer.poll() is None
            time.sleep(0.05)
        trainer.communicate(b"\n")
    assert follower.stop() is None
    steps = set(range(1, 7))
    assert store.points(writer.run_id, "loss/current").keys() == steps
    assert store.points(writer.run_id, "lr/d_lr").keys() == steps
    assert store.points(writer.run_id, "time/step_seconds").keys() == steps - {1}
    assert len(shown) == 17
    assert writer.problems == []


# What is cut or corrupt at the end is said, and a sink that fails does not stop the metrics.
def test_the_follower_warns_and_goes_on(store: Store, tmp_path: Path) -> None:
    from test_tensorboard_tail import append, event_file, scalar

    def fail(_: list[Point]) -> None:
        raise RuntimeError("no terminal")

    writer = start(store)
    append(event_file(tmp_path), scalar("loss/current", 1, 0.5))
    follower = MetricsFollower(tmp_path, writer, interval=0.05, on_points=fail).start()
    append(event_file(tmp_path), scalar("loss/current", 2, 0.5)[:-3])
    warning = follower.stop()
    assert warning is not None and "cut or corrupt" in warning and "\n" not in warning
    assert store.points(writer.run_id, "loss/current") == {1: 0.5}


# More points than one request takes, odd names and values that are no number: all are stored.
def test_every_point_is_stored(store: Store) -> None:
    writer = start(store)
    odd = [
        Point("lr/d*lr/unet", 0.5, 1, 1000),
        Point("loss/current", math.nan, 2001, 1000),
        Point("loss/current", math.inf, 2002, 1000),
        Point("", 1.0, 1, 1000),
    ]
    writer.log_points(points(2000) + odd)
    writer.finish("FINISHED")
    full_key = store.points(writer.run_id, "loss/current")
    assert full_key.keys() == set(range(1, 2003))
    assert math.isnan(full_key[2001]) and full_key[2002] > 1e308
    assert store.points(writer.run_id, "lr/d_lr/unet") == {1: 0.5}
    assert store.points(writer.run_id, "unnamed") == {1: 1.0}
    run = store.client.get_run(writer.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["runner.not_finite_points"] == "2"
    assert writer.problems == []


class Flaky:
    """A client whose `log_batch` fails, now and then after the server had taken the batch."""

    def __init__(self, client: Any, fail: list[str]) -> None:
        self._client = client
        self._fail = fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, *args: Any, **options: Any) -> None:
        from mlflow.exceptions import MlflowException

        how = self._fail.pop(0) if self._fail else "works"
        if how != "before":
            self._client.log_batch(*args, **options)
        if how != "works":
            raise MlflowException("connection lost token=abcd1234")


# Points of a failed call are sent by the next one, once each, also when the server had taken
# them; the caller sees no exception, and the problem is one line without secrets.
def test_failed_sends_are_sent_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.tracking.mlflow_run.FINISH_WAIT_SECONDS", 0.0)
    writer, _ = start_with(store, partial(Flaky, fail=["before", "after", "works"]))
    for point in points(4):
        writer.log_points([point])
    writer.set_tags({"kept": "yes"})
    writer.finish("FINISHED")
    assert store.points(writer.run_id, "loss/current").keys() == {1, 2, 3, 4}
    assert store.client.get_run(writer.run_id).data.tags["kept"] == "yes"
    assert writer.problems == ["metrics not sent to MLflow yet: connection lost token=***"]


# If the server stays away, the run still gets its true status, and the loss is said.
def test_the_status_is_set_even_if_points_are_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.tracking.mlflow_run.FINISH_WAIT_SECONDS", 0.0)
    writer, _ = start_with(store, partial(Flaky, fail=["before"] * 99))
    writer.log_points(points(3))
    writer.finish("FAILED")
    assert store.client.get_run(writer.run_id).info.status == "FAILED"
    assert writer.problems[-1] == "3 metric points were not sent to MLflow"


class Away:
    """A client of a server that does not answer while `away`, and what it was asked then."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.away = True
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **options: Any) -> Any:
            if self.away:
                self.asked.append(name)
                raise ConnectionError("timed out")
            return getattr(self._client, name)(*args, **options)

        return ask


def ends(writer: RunWriter, folder: Path) -> None:
    """The end of a run with all it sends, as the record of a run does it."""
    from runner.pipeline.record import Recorder

    record = Recorder(writer, folder, "key", "engine 1")
    for name in ("config.yaml", "train.toml", "lora.safetensors"):
        (folder / name).write_text("x")
    writer.set_tags({"kept": "yes"})
    record.finish("FAILED", "why")


# Each try to reach a server that hangs takes minutes: after one it is left alone for a while, and
# the end of a run tries twice, whatever there is to send; what was lost is said.
def test_a_server_that_is_away_is_asked_seldom(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.tracking.mlflow_run.FINISH_WAIT_SECONDS", 0.0)
    writer, client = start_with(store, Away)
    for point in points(5):
        writer.log_points([point])
    assert client.asked == ["log_batch"]
    ends(writer, tmp_path)
    assert client.asked == ["log_batch", "log_batch", "set_terminated"]
    assert writer.problems[-2].startswith("not sent to MLflow: tags, artifact config.yaml, ")
    assert writer.problems[-1] == "5 metric points were not sent to MLflow"


# Nothing is lost to the rest: when the server is back, during a run or at its end, all is sent.
@pytest.mark.parametrize("rest", [0.0, 600.0])
def test_all_is_sent_when_the_server_is_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: float
) -> None:
    monkeypatch.setattr("runner.tracking.mlflow_run.PAUSE_SECONDS", rest)
    writer, client = start_with(store, Away)
    writer.log_points(points(3))
    client.away = False
    time.sleep(0.01)
    writer.log_points([])
    assert len(store.points(writer.run_id, "loss/current")) == (0 if rest else 3)
    ends(writer, tmp_path)
    run = store.client.get_run(writer.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["kept"] == "yes" and run.data.tags["run.error"] == "why"
    assert len(store.points(writer.run_id, "loss/current")) == 3
    full_key = {file.path for file in store.client.list_artifacts(writer.run_id)}
    assert full_key == {"config.yaml", "train.toml", "lora.safetensors"}
    assert writer.problems == ["metrics not sent to MLflow yet: timed out"]


# Long values are cut with a mark, odd keys are cleaned, nested settings get dotted names.
def test_parameters_and_tags_fit(store: Store) -> None:
    params = {
        "network": {"rank": 8, "alpha": None, "args": ["a=1", True]},
        "lr*": 1e-4,
        "caption": "é" * 7000,
        "empty": "",
        "k" * 300: 1,
        **{f"many.{number}": number for number in range(150)},
    }
    writer = start(store, params=params, tags={"runner.note": "x" * 9000, "odd*key": "1"})
    assert writer.problems == []
    data = store.client.get_run(writer.run_id).data
    assert data.params["network.rank"] == "8"
    assert data.params["network.alpha"] == "null"
    assert data.params["network.args"] == "[a=1, true]"
    assert data.params["lr_"] == "0.0001"
    assert data.params["empty"] == ""
    assert len(data.params["caption"]) == 6000
    assert data.params["caption"].endswith("[cut, 7,000 characters in all]")
    assert len(data.params) == 157
    assert len(data.tags["runner.note"]) == 8000 and "[cut, 9,000" in data.tags["runner.note"]
    assert data.tags["odd_key"] == "1"


# One refused entry does not take the others with it, and refusing is not an exception.
def test_a_refused_parameter_leaves_the_others(store: Store) -> None:
    writer = start(store, params={"rank": 8})
    writer.log_params({"alpha": 8, "rank": 16, "seed": 42})
    params = store.client.get_run(writer.run_id).data.params
    assert params == {"rank": "8", "alpha": "8", "seed": "42"}
    assert len(writer.problems) == 1 and writer.problems[0].startswith("parameters rejected")


class Signalled:
    """A client whose process gets a signal while it sends metrics."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, *args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0)
        self._client.log_batch(*args, **options)


# A signal ends the run as KILLED, even in the middle of a call, and what a `finally` says
# afterwards does not change that.
def test_a_killed_run_ends_as_killed(store: Store) -> None:
    writer, _ = start_with(store, Signalled)
    before = signal.signal(signal.SIGUSR1, lambda *_: writer.finish("KILLED"))
    try:
        writer.log_points(points(1))
    finally:
        signal.signal(signal.SIGUSR1, before)
        writer.finish("FINISHED")
    run = store.client.get_run(writer.run_id)
    assert run.info.status == "KILLED" and run.info.end_time


# No secret reaches the database or an artifact, by whatever way it goes in; other files are
# stored byte for byte.
def test_secrets_never_reach_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "Zx9NothingLikeAToken"
    monkeypatch.setenv("HF_TOKEN", secret)
    log = tmp_path / "train.log"
    log.write_bytes(b"\xff raw\r\n" + f"login {secret} https://ann:{secret}@host/x\n".encode())
    plain = tmp_path / "plain.log"
    plain.write_bytes(b"\xff raw \r\n\x00 end")
    writer = start(
        store,
        name=f"run {secret}",
        params={"hub": {"token": secret}, "path": f"/x/{secret}"},
        tags={"note": f"a {secret}"},
    )
    writer.log_params({"more": [secret]})
    writer.set_tags({"more": secret})
    writer.log_text(f"token: {secret}", "config/config.yaml")
    writer.log_artifact(log, "logs")
    writer.log_artifact(plain, "logs")
    writer.finish("FINISHED")
    files = [file for file in store.outputs.rglob("*") if file.is_file()]
    assert {"config.yaml", "train.log", "plain.log"} <= {file.name for file in files}
    assert [str(file) for file in files if secret.encode() in file.read_bytes()] == []
    full_key = {file.name: file.read_bytes() for file in files}
    assert full_key["plain.log"] == plain.read_bytes()
    assert full_key["train.log"] == b"\xff raw\r\nlogin *** https://ann:***@host/x\n"
    assert writer.problems == []


# A file that is not there is a line among the problems, not an exception.
def test_a_missing_artifact_is_a_problem(store: Store) -> None:
    writer = start(store)
    writer.log_artifact(store.outputs / "lora.safetensors")
    writer.finish("FINISHED")
    assert store.client.get_run(writer.run_id).info.status == "FINISHED"
    assert len(writer.problems) == 1 and "lora.safetensors" in writer.problems[0]


class Refusing:
    """A client of a server that answers the first artifact with an HTTP status, the rest well."""

    def __init__(self, client: Any, status: int) -> None:
        self._client = client
        self._status: int | None = status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_artifact(self, *args: Any, **options: Any) -> None:
        import requests

        if self._status is not None:
            response = requests.Response()
            response.status_code, self._status = self._status, None
            raise requests.HTTPError("the server said no", response=response)
        self._client.log_artifact(*args, **options)


# An artifact is sent again where the server may take it later: it is busy, limits the rate, lost
# the login or broke down. It is given up where the server will never have it.
@pytest.mark.parametrize(
    ("status", "later"),
    [
        *((401, True), (403, True), (408, True), (429, True), (500, True), (503, True)),
        *((400, False), (404, False), (413, False)),
    ],
)
def test_a_refused_artifact_is_sent_again(store: Store, status: int, later: bool) -> None:
    writer, _ = start_with(store, partial(Refusing, status=status))
    file = store.outputs / "lora.safetensors"
    file.write_bytes(b"weights")
    writer.log_artifact(file)
    writer.finish("FINISHED")
    full_key = [artifact.path for artifact in store.client.list_artifacts(writer.run_id)]
    assert full_key == (["lora.safetensors"] if later else [])
    how = "not sent to MLflow yet" if later else "rejected by MLflow"
    assert writer.problems == [f"artifact lora.safetensors {how}: the server said no"]


# A store works below a path of any characters, leaves nothing beside it, and its artifacts
# land in it; two names of one experiment are one.
def test_any_path_holds_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    outputs = tmp_path / "sp ace [x] é 'q' \"d\" # ?a=b&c 100% %41 ~;:@ $HOME" / "outputs"
    uri = mlflow_store.sqlite_uri(outputs)
    mlflow_store.initialise(uri, outputs)
    mlflow_store.initialise(uri, outputs)
    writer = RunWriter.start(uri, "tests", outputs=outputs, name="a run", params={}, tags={})
    writer.log_text("hello", "a/b.txt")
    writer.finish("FINISHED")
    assert writer.problems == []
    [artifact] = outputs.glob("mlartifacts/*/artifacts/a/b.txt")
    assert artifact.read_text() == "hello"
    names = {path.name for path in outputs.iterdir()}
    assert names == {"mlflow.db", "mlflow.db.lock", "mlartifacts"}
    assert {path.name for path in tmp_path.iterdir()} == {"cwd", outputs.parent.name}
    assert list(elsewhere.iterdir()) == []


# A store that cannot be used is said in one line before anything starts, within seconds.
def test_unusable_stores_are_said(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow.db").write_text("not a database, but long enough to have a header")
    file = tmp_path / "file"
    file.write_text("")
    for uri, outputs, words in [
        ("file:///tmp/mlruns", tmp_path, "plain folders"),
        ("sqlite:///mlflow.db", tmp_path, "absolute"),
        (mlflow_store.sqlite_uri(other), other, "not a SQLite file"),
        (store.uri, file / "outputs", "cannot create"),
        ("http://ann:geheim@127.0.0.1:9", tmp_path, "nothing listens"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            mlflow_store.initialise(uri, outputs)
        assert "\n" not in str(caught.value) and "geheim" not in str(caught.value)


# Two processes that make the same experiment at the same moment get the same one.
def test_an_experiment_made_meanwhile_is_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    ask = MlflowClient.get_experiment_by_name
    made: list[str] = []

    def ask_too_early(client: Any, name: str) -> Any:
        found = ask(client, name)
        if not made:
            made.append(client.create_experiment(name))
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", ask_too_early)
    assert [mlflow_store.ensure_experiment(store.uri, "race", None)] == made


# An experiment deleted in the UI is said, since MLflow would refuse every run in it.
def test_a_deleted_experiment_is_said(store: Store) -> None:
    root = mlflow_store.artifact_root(store.outputs)
    experiment = mlflow_store.ensure_experiment(store.uri, "gone", root)
    assert mlflow_store.ensure_experiment(store.uri, "gone", root) == experiment
    store.client.delete_experiment(experiment)
    with pytest.raises(UserError, match="was deleted"):
        mlflow_store.ensure_experiment(store.uri, "gone", root)


# tracking=none takes every call a run takes.
def test_the_null_writer_takes_every_call(tmp_path: Path) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(RunWriter) - public(NullWriter) == {"start"}
    assert MetricsFollower(tmp_path, NullWriter()).start().stop() is None
