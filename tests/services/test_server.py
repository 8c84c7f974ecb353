"""`tracking=server` on PostgreSQL, with authentication and artifacts through the server."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from service_fixtures import PASSWORDS, begin, credentials

if TYPE_CHECKING:
    from service_fixtures import Service

pytest_plugins = ["service_fixtures"]

RUNS = 8
STEPS = 12
EXPERIMENT = "eight at once"
TINY = ["experiment=rehearsal", "network.rank=1", f"training.max_steps={STEPS}", "tracking=server"]
LORAS = {"lora.safetensors", "lora_comfyui.safetensors"}
FILES = LORAS | {"config.yaml", "overrides.txt", "commands.sh", "dataset.toml", "train.toml"}


@dataclass(frozen=True)
class Eight:
    cwd: Path
    output: dict[str, str]
    """What each run printed."""
    command_lines: set[str]
    """Those of all processes of this machine while the runs ran."""
    seconds: float
    most_at_once: int
    """How many runs were RUNNING on the server at one moment."""

    def folders(self) -> list[Path]:
        return sorted((self.cwd / "outputs" / "runs").glob("*/*"))


def secrets_of(service: Service) -> list[str]:
    return [*PASSWORDS.values(), service.server.admin, service.database.password]


@pytest.fixture(scope="module")
def eight(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Eight:
    """Eight runs of two users at once, on an experiment that is not there yet.

    The last has its name and password in MLFLOW_TRACKING_URI.
    """
    cwd = tmp_path_factory.mktemp("it's [a] folder, ünïcode")
    began = time.monotonic()
    processes = {}
    for number in range(RUNS):
        name, user = f"run-{number}", ("ann", "bob")[number % 2]
        uri = [f"tracking.uri={service.url}"]
        environment = credentials(user)
        if number == RUNS - 1:
            address = service.url.replace("://", f"://{user}:{PASSWORDS[user]}@")
            uri, environment = [], {"MLFLOW_TRACKING_URI": address}
        arguments = [*TINY, *uri, f"tracking.experiment={EXPERIMENT}", f"name={name}"]
        arguments += [f"training.seed={number}", "stages.skip=[evaluate]"]
        processes[name] = begin(cwd, environment, *arguments)
    lines: set[str] = set()
    most = 0
    with service.client("ann") as client:
        while any(process.poll() is None for process in processes.values()):
            for process in psutil.process_iter(["cmdline"]):
                lines.add(" ".join(process.info["cmdline"] or []))
            running = [run for run in found_runs(client) if run.info.status == "RUNNING"]
            most = max(most, len(running))
            time.sleep(0.5)
    output = {}
    for name, process in processes.items():
        output[name] = process.communicate()[0]
        assert process.returncode == 0, output[name]
    return Eight(cwd, output, lines, time.monotonic() - began, most)


def found_runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def written_points(run: Path) -> dict[str, set[tuple[int, float]]]:
    """Every scalar of a run's TensorBoard files, read by TensorBoard's own loader."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    points = defaultdict(set)
    for file in run.rglob("events.out.tfevents.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.WhichOneof("value") == "tensor" and not value.tensor.string_val:
                    number = float(tensor_util.make_ndarray(value.tensor))
                    points[value.tag].add((event.step, number))
    return points


def files_below(client: Any, run_id: str, folder: str | None = None) -> list[str]:
    found: list[str] = []
    for file in client.list_artifacts(run_id, folder):
        found += files_below(client, run_id, file.path) if file.is_dir else [file.path]
    return found


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Eight runs that write at once end as FINISHED, each with every point its trainer wrote, once.
def test_every_point_of_eight_runs_is_there(service: Service, eight: Eight) -> None:
    assert eight.most_at_once >= 2, "the runs did not overlap on the server"
    assert len(eight.folders()) == RUNS
    total = 0
    with service.client("ann") as client:
        full_key = {run.info.run_id: run for run in found_runs(client)}
        assert len(full_key) == RUNS
        assert {run.info.run_name for run in full_key.values()} == set(eight.output)
        for folder in eight.folders():
            run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
            assert full_key[run_id].info.status == "FINISHED"
            written = written_points(folder)
            assert {step for step, _ in written["loss/current"]} == set(range(1, STEPS + 1))
            for key, points in written.items():
                history = client.get_metric_history(run_id, key)
                assert len(history) == len(points), f"{key} of {folder.name}"
                assert {(metric.step, metric.value) for metric in history} == points
                total += len(points)
            speeds = client.get_metric_history(run_id, "time/step_seconds")
            assert len(speeds) == STEPS - 1
            assert all(math.isfinite(metric.value) for metric in speeds)
    print(f"{RUNS} runs in {eight.seconds:.0f} s, {eight.most_at_once} RUNNING at one moment,")
    print(f"{total} points of TensorBoard all found once")
    for text in eight.output.values():
        assert "MLflow:" not in text, text


# Every file of every run can be had from the server, byte for byte as the run has it.
def test_every_file_of_eight_runs_is_there(service: Service, eight: Eight, tmp_path: Path) -> None:
    count, size = 0, 0
    with service.client("bob") as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment.artifact_location.startswith("mlflow-artifacts:/")
        for folder in eight.folders():
            run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
            names = files_below(client, run_id)
            assert set(names) >= FILES | {"logs/train.log"}, names
            copies = tmp_path / run_id
            copies.mkdir()
            client.download_artifacts(run_id, "", str(copies))
            for name in names:
                copy = copies / name
                assert digest(copy) == digest(folder / name), name
                count, size = count + 1, size + copy.stat().st_size
    kept = [file for file in service.server.artifacts.rglob("*") if file.is_file()]
    assert len(kept) >= count
    print(f"{count} files, {size / 1e6:.1f} MB, equal by SHA-256")


# No password is in a file of a run, of the server or of the database, in what is printed, or in
# a command line.
def test_no_password_is_anywhere(service: Service, eight: Eight) -> None:
    texts = [*eight.output.values(), *eight.command_lines]
    assert any("name=run-3" in text for text in eight.command_lines)
    for secret in secrets_of(service):
        assert not any(secret in text for text in texts)
    # Those that the server was given are in its own configuration.
    searched = [eight.cwd, service.server.artifacts, service.server.log, service.database.folder]
    seen = dict.fromkeys(searched, 0)
    for place in searched:
        for file in [place, *place.rglob("*")]:
            if not file.is_file():
                continue
            content = file.read_bytes()
            for word in PASSWORDS.values():
                assert word.encode() not in content, file
            seen[place] += b"run-3" in content or b"eight" in content or b"runs/create" in content
    assert all(seen.values()), f"the search did not look where the runs wrote: {seen}"


# A sweep on the server is one parent with its children, and a table of them.
def test_a_sweep_has_its_parent(service: Service, eight: Eight, tmp_path: Path) -> None:
    arguments = [*TINY, f"tracking.uri={service.url}", "tracking.experiment=swept"]
    arguments += ["stages.skip=[evaluate]", "network.rank=1,2", "training.max_steps=3"]
    arguments.remove("network.rank=1")
    arguments.remove(f"training.max_steps={STEPS}")
    process = begin(eight.cwd, credentials("bob"), "-m", *arguments)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    with service.client("ann") as client:
        experiment = client.get_experiment_by_name("swept")
        runs = client.search_runs([experiment.experiment_id])
        [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        assert {run.data.params["network.rank"] for run in children} == {"1", "2"}
        assert {run.info.status for run in runs} == {"FINISHED"}
        table = Path(client.download_artifacts(parent.info.run_id, "sweep.csv", str(tmp_path)))
        assert len(table.read_text().splitlines()) == 3
