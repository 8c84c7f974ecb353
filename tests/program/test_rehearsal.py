"""The real program, end to end, on real media: what a person gets from each command."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import TOP, Finished, run_program, tree

from runner.pipeline.checkpoints import converted_name

SAMPLE = TOP / "runner" / "data" / "sample"
LORAS = ("lora.safetensors", "lora_comfyui.safetensors")
SHORT = ["training.epochs=2", "training.save_every_epochs=1"]


# Read by Python when the runner starts: it writes down every process that this starts. The stages'
# processes don't read it, as their commands say what PYTHONPATH is.
WATCH = """
import json, os, sys

def watch(event, given):
    if event == "subprocess.Popen":
        _, argv, cwd, env = given
        env = dict(os.environ if env is None else env)
        line = {"argv": list(argv), "cwd": str(cwd), "env": env}
        with open(os.environ["LAUNCHED"], "a") as log:
            log.write(json.dumps(line) + "\\n")

sys.addaudithook(watch)
"""


def rehearse(cwd: Path, *arguments: str, env: dict[str, str] | None = None) -> Finished:
    return run_program("experiment=rehearsal", *SHORT, *arguments, cwd=cwd, env=env)


def runs(cwd: Path) -> list[Path]:
    return sorted((cwd / "outputs" / "runs").glob("*/*"))


def recorded(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def client(cwd: Path) -> Any:
    from runner.tracking.client import connect
    from runner.tracking.mlflow_store import sqlite_uri

    return connect(sqlite_uri(cwd / "outputs"))


def mlflow_run(cwd: Path, run: Path) -> Any:
    return client(cwd).get_run(recorded(run)["mlflow_run_id"])


def artifacts(cwd: Path, run: Path, folder: str | None = None) -> set[str]:
    listed = client(cwd).list_artifacts(recorded(run)["mlflow_run_id"], folder)
    return {file.path for file in listed}


def made_zip(place: Path) -> Path:
    """The sample's media as a user's zip, nested folders and all."""
    with zipfile.ZipFile(place, "w") as archive:
        for file in sorted(SAMPLE.rglob("*")):
            if file.is_file() and file.suffix != ".md":
                archive.write(file, f"my data/{file.relative_to(SAMPLE)}")
    return place


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """One whole t2v run from a zip, in a folder whose name holds all that a path may hold."""
    cwd = tmp_path_factory.mktemp("it's [a] folder, ünïcode ~ (1)")
    archive = made_zip(cwd / "my [data] zip's.zip")
    watch = tmp_path_factory.mktemp("watch")
    (watch / "sitecustomize.py").write_text(WATCH)
    env = {"PYTHONPATH": f"{watch}{os.pathsep}{TOP}", "LAUNCHED": str(cwd / "launched.jsonl")}
    return cwd, rehearse(cwd, f"dataset.path={archive.name}", "dataset=zip", "name=first", env=env)


# What this run did itself is not said to have been done already.
def test_a_first_run_says_what_it_did(first: tuple[Path, Finished]) -> None:
    _, done = first
    assert done.code == 0, done.err
    assert "(done already)" not in done.out
    assert re.search(r"dataset +\d+ pictures?, \d+ clips?, \d+ unpacked\n", done.out), done.out


def commands_of(script: Path) -> list[tuple[list[str], dict[str, str], set[str]]]:
    """The commands of a commands.sh: arguments, what is set in the environment, and what unset."""
    found: list[tuple[list[str], dict[str, str], set[str]]] = []
    text = script.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[:2] == ["set -e", 'cd "$(dirname "$0")"']
    for line in lines[2:]:
        words = shlex.split(line)
        given: dict[str, str] = {}
        unset: set[str] = set()
        if words[0] == "env":
            del words[0]
            while (word := words[0]) == "-u" or "=" in word:
                del words[0]
                if word == "-u":
                    unset.add(words.pop(0))
                else:
                    name, _, value = word.partition("=")
                    given[name] = value
        found.append((words, given, unset))
    return found


# One command trains a LoRA from a zip of pictures and clips, to a ComfyUI file and an MLflow run.
def test_a_zip_becomes_a_lora(first: tuple[Path, Finished]) -> None:
    from safetensors import safe_open

    cwd, done = first
    assert done.code == 0, done.err + done.out
    (run,) = runs(cwd)
    for name in ("config.yaml", "dataset.toml", "train.toml", "commands.sh", "evaluation.json"):
        assert (run / name).stat().st_size > 0
    assert "bunny_rises.mp4" in (run / "dataset_report.html").read_text()
    with safe_open(run / "lora.safetensors", framework="pt") as file:
        names = set(file.keys())
    # Two blocks of 14 linears, each with down, up and alpha.
    assert len(names) == 2 * 14 * 3
    with safe_open(run / "lora_comfyui.safetensors", framework="pt") as file:
        assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in file.keys()  # noqa: SIM118
    assert (run / "checkpoints" / "lora-000001.safetensors").is_file()
    label = f"{run.parent.name}-{run.name}"
    names = {file.name for file in (run / "checkpoints" / "comfyui").iterdir()}
    assert names == {f"{label}-epoch000001.safetensors", f"{label}.safetensors"}
    for name in ("lora_comfyui.safetensors", *(f"checkpoints/comfyui/{name}" for name in names)):
        with safe_open(run / name, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["ss_run_id"] == recorded(run)["mlflow_run_id"]
        assert metadata["modelspec.resolution"] == "96x64"
        assert metadata["ss_base_model_version"] == "hunyuan_video_1_5"
    assert not list(run.rglob("*.tmp"))


# Everything that decides a run, and everything it made, is in MLflow; its end is the true one.
def test_the_run_is_in_mlflow(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    (run,) = runs(cwd)
    record = mlflow_run(cwd, run)
    assert record.info.status == "FINISHED"
    params = record.data.params
    assert (params["task"], params["optimizer"], params["network.rank"]) == ("t2v", "adamw", "4")
    assert params["training.seed"] == "42"
    metrics = record.data.metrics
    for key in ("loss/current", "loss/average", "lr/unet", "time/step_seconds", "eval/loss"):
        assert key in metrics, sorted(metrics)
    steps = client(cwd).get_metric_history(record.info.run_id, "loss/current")
    assert [point.step for point in steps] == list(range(1, len(steps) + 1))
    assert len(steps) == 2 * int(re.search(r"epochs of (\d+)", page(cwd)).group(1))  # type: ignore[union-attr]
    tags = record.data.tags
    for key in ("runner.commit", "engine.version", "dataset.fingerprint", "host", "gpu"):
        assert tags[key]
    # The weights were made by this very run, and what gave the result is known since.
    assert tags["config.fingerprint"] == recorded(run)["config_fingerprint"]
    assert tags["config.resume_key"] == recorded(run)["resume_key"]
    assert tags["engine.version"] == recorded(run)["engine_version"]
    assert tags["eval.items"].endswith("training items")
    names = artifacts(cwd, run)
    for name in ("config.yaml", "overrides.txt", "dataset.toml", "train.toml", "commands.sh"):
        assert name in names
    assert "dataset_report.html" in names
    assert {"lora.safetensors", "lora_comfyui.safetensors"} <= names
    assert "logs/train.log" in artifacts(cwd, run, "logs")


def page(cwd: Path, *arguments: str) -> str:
    archive = next(cwd.glob("*.zip")).name
    done = rehearse(cwd, f"dataset.path={archive}", "dataset=zip", "dry_run=true", *arguments)
    assert done.code == 0, done.err
    return done.out


# In a file the output is plain text: no escape codes, no carriage returns, whole lines.
def test_piped_output_is_plain(first: tuple[Path, Finished]) -> None:
    _, done = first
    assert not re.search(r"[\x1b\r]", done.out)
    assert re.search(r"^\[5/7\] train     \d+ steps$", done.out, re.MULTILINE)
    assert re.search(r"^      steps (\d+)/\1  loss \d", done.out, re.MULTILINE), done.out
    assert "lora_comfyui.safetensors" in done.out
    assert " -m runner.ui" in done.out


def cached(cwd: Path) -> dict[str, tuple[int, int]]:
    """What lies in the cache of media and what was made of them."""
    cache = cwd / "outputs" / "cache"
    namespaces = ("media", "latents", "text", "looks")
    return {f"{s}/{name}": what for s in namespaces for name, what in tree(cache / s).items()}


# A second run on the same data unpacks and encodes nothing, whatever its rank or the zip's name.
def test_a_second_run_encodes_nothing(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    before = cached(cwd)
    assert sum("looks" in name for name in before) >= 7
    archive = next(cwd.glob("*.zip"))
    renamed = archive.rename(cwd / "renamed.zip")
    try:
        done = rehearse(cwd, "dataset.path=renamed.zip", "network.rank=2", "name=second")
    finally:
        renamed.rename(archive)
    assert done.code == 0, done.err
    assert done.out.count("(done already)") == 4, done.out
    assert cached(cwd) == before
    losses = [json.loads((r / "evaluation.json").read_text())["base_loss"] for r in runs(cwd)]
    # The base network's loss is the same for every run on a dataset: that is what makes eval/loss
    # comparable.
    assert losses[0] == losses[1]


def store(cwd: Path) -> dict[Path, str]:
    """The checksum of every entry of the cache."""
    namespaces = (
        cwd / "outputs" / "cache" / namespace for namespace in ("media", "latents", "text")
    )
    files = (file for namespace in namespaces for file in sorted(namespace.glob("*/*")))
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# Damaged entries are no failure: the run says so, encodes just these again, and nothing else in the
# cache changes by a single bit. A dry run before it reads no bytes and says nothing wrong. Whose
# entries they are is known to `python -m runner.cache`.
def test_damage_is_mended_in_the_same_run(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    before = store(cwd)
    entries = [file for file in before if file.suffix != ".json"]
    of = {
        namespace: next(f for f in entries if namespace in f.parts)
        for namespace in ("latents", "text")
    }
    for namespace, file in of.items():
        data = file.read_bytes()
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        file.chmod(0o644)
        file.write_bytes(flipped if namespace == "latents" else data[:-1])
    planned = page(cwd)
    assert re.search(r"latents +done +\d+ latents\n", planned)
    assert re.search(r"text +to run +1 caption to encode, \d+ cached\n", planned)
    archive = next(cwd.glob("*.zip")).name
    only = ("stages.skip=[train]", "tracking=none", "name=mending")
    done = rehearse(cwd, f"dataset.path={archive}", "dataset=zip", *only)
    assert done.code == 0, done.err + done.out
    assert "note: 1 of the latents was damaged in the cache and is made again: " in done.out
    assert (
        "note: 1 of the encoded captions was damaged in the cache and is made again: " in done.out
    )
    assert re.search(
        r"latents +1 latent to encode, \d+ cached\n(?: +encoded 0/1.*\n)* +encoded 1/1", done.out
    )
    assert store(cwd) == before
    (run,) = (r for r in runs(cwd) if r.name.endswith("-mending"))
    assert len(re.findall(r"cache_(?:latents|text) ", (run / "commands.sh").read_text())) == 2
    listed = run_program(cwd=cwd, module="runner.cache").out
    assert re.search(rf"^{re.escape(archive)} +\d+ ", listed, re.MULTILINE), listed
    assert not list((cwd / "outputs" / "cache").rglob("*.lock.*"))
    assert not list((cwd / "outputs" / "cache" / "claims").iterdir())


# commands.sh is what ran: in every stage the very processes that the runner started in the run's
# folder, in their order and with their environment, and no others but those that convert
# checkpoints beside the training.
def test_the_script_is_what_ran(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    run = runs(cwd)[0]
    started = [json.loads(line) for line in (cwd / "launched.jsonl").read_text().splitlines()]
    # What the runner does itself beside the training is a comment there.
    launched = [
        process
        for process in started
        if process["cwd"] == str(run) and "--background" not in process["argv"]
    ]
    commands = commands_of(run / "commands.sh")
    assert [process["argv"] for process in launched] == [argv for argv, _, _ in commands]
    for process, (_, given, unset) in zip(launched, commands, strict=True):
        assert given.items() <= process["env"].items()
        assert not unset & process["env"].keys()
    names = ["sh" if argv[0] == "sh" else argv[2].rpartition(".")[2] for argv, _, _ in commands]
    encode = ["cache_latents", "cache_text"]
    assert names == ["make_weights", *encode, "train", "sh", "convert", "evaluate"]
    said = (run / "logs/convert.log").read_text()
    assert re.fullmatch(r"lora\.safetensors -> lora_comfyui\.safetensors: \d+ tensors\n", said)


# The commands can be run by hand from the run's folder, and give the same LoRA.
def test_commands_run_by_hand(first: tuple[Path, Finished]) -> None:
    from safetensors.torch import load_file

    cwd, _ = first
    run = runs(cwd)[0]
    copy = run.parent / "by hand"
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints")
    for file in LORAS:
        (copy / file).unlink()
    done = subprocess.run(["sh", "./commands.sh"], cwd=copy, capture_output=True, text=True)
    shutil.move(copy, cwd / "by hand")
    assert done.returncode == 0, done.stderr
    for file in LORAS:
        ours, theirs = load_file(run / file), load_file(cwd / "by hand" / file)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)


# Image to video trains on the clips alone, says so, and takes another optimizer in passing.
def test_i2v_with_adafactor_and_previews(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    picture = next(SAMPLE.rglob("*.jpg"))
    # A fraction that holds out one of the two clips and keeps the other.
    low, high = sorted(
        int(hashlib.sha256(clip.read_bytes()).hexdigest()[:13], 16) / 16**13
        for clip in SAMPLE.rglob("*.mp4")
    )
    fraction = (low + high) / 2
    done = rehearse(
        cwd,
        *("task=i2v", "optimizer=adafactor", "dataset=sample", "name=i2v", "sampling=prompts"),
        *("sampling.prompts=[a rabbit]", f"sampling.image_path={picture}", "sampling.steps=2"),
        *("sampling.width=96", "sampling.height=64", "sampling.frames=5"),
        *(f"dataset.validation_fraction={fraction}", "dataset.trigger_word=ohwx"),
    )
    assert done.code == 0, done.err + done.out
    assert "pictures left out" in done.out
    run = next(r for r in runs(cwd) if r.name.endswith("-i2v"))
    assert "adafactor" in (run / "train.toml").read_text()
    previews = list((run / "samples").iterdir())
    assert [file.suffix for file in previews] == [".mp4"] * len(previews)
    assert previews
    assert artifacts(cwd, run, "samples")
    record = mlflow_run(cwd, run)
    assert (run / "validation.toml").is_file()
    assert "held-out item" in record.data.tags["eval.items"]


# A sweep makes one parent and a child for each value, each labelled, all on the same yardstick.
def test_a_sweep_has_a_parent_and_children(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    done = rehearse(
        cwd, "-m", "dataset=sample", "network.rank=2,4", "tracking.experiment=swept", "name=sweep"
    )
    assert done.code == 0, done.err + done.out
    api = client(cwd)
    experiment = api.get_experiment_by_name("swept")
    found = api.search_runs([experiment.experiment_id])
    children = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    (parent,) = (r for r in found if r not in children)
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert sorted(r.data.params["network.rank"] for r in children) == ["2", "4"]
    assert {r.info.status for r in found} == {"FINISHED"}
    assert len({r.data.metrics["eval/base_loss"] for r in children}) == 1
    assert len({r.data.metrics["eval/loss"] for r in children}) == 2
    assert not (cwd / "multirun").exists()


# One run of a sweep that cannot start does not stop the others, and the exit code tells.
def test_a_sweep_goes_on_after_a_failure(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    done = rehearse(
        cwd, "-m", "dataset=sample", "network.rank=0,2", "training.max_steps=1", "tracking=none"
    )
    assert done.code == 2
    assert "error: network.rank=0 is too small" in done.err
    assert "finished in" in done.out


# Ended by a signal, the run is KILLED, its commands are gone, its checkpoints are converted, and
# the exit code says so.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_everything(
    first: tuple[Path, Finished], number: signal.Signals, code: int
) -> None:
    import psutil

    cwd, _ = first
    name = f"ended-{code}"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "runner",
            "experiment=rehearsal",
            "dataset=sample",
            f"name={name}",
            "training.epochs=100000",
            "training.save_every_steps=10",
            "training.keep_last=2",
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(TOP)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    saved: list[Path] = []
    while not saved and time.monotonic() < deadline:
        time.sleep(0.5)
        saved = [e for r in runs(cwd) if name in r.name for e in r.glob("checkpoints/*-step*")]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"was ended by {number.name}" in err
    assert children
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    (run,) = (r for r in runs(cwd) if name in r.name)
    assert recorded(run)["status"] == "KILLED"
    assert mlflow_run(cwd, run).info.status == "KILLED"
    # Every checkpoint that is kept has its file for ComfyUI, and no other.
    kept = {file.name for file in (run / "checkpoints").glob("*.safetensors")}
    converted = {file.stem for file in (run / "checkpoints/comfyui").glob("*.safetensors")}
    assert kept
    assert converted == {converted_name(run, name) for name in kept}


# A stage that fails is named with its own last error and its log; MLflow says FAILED, and what
# was finished is kept.
def test_a_failing_stage_is_reported_in_one_line(first: tuple[Path, Finished]) -> None:
    cwd, _ = first
    (weights,) = (cwd / "outputs/cache/weights").rglob("transformer/t2v/*.safetensors")
    whole = weights.read_bytes()
    # Cut in its tensors: the stages before training do not read it.
    weights.write_bytes(whole[:-1000])
    try:
        done = rehearse(cwd, "dataset=sample", "name=fails")
    finally:
        weights.write_bytes(whole)
    assert done.code == 1
    (run,) = (r for r in runs(cwd) if r.name.endswith("-fails"))
    assert done.err.startswith("error: stage train failed: ")
    assert done.err.count("\n") == 1
    assert str(run / "logs" / "train.log") in done.err
    assert mlflow_run(cwd, run).info.status == "FAILED"
    assert (run / "cache").is_dir()


# A dry run touches nothing: the tree is the same before and after, single run and sweep, for
# either engine, with caches there or not.
@pytest.mark.parametrize("sweep", [[], ["-m", "network.rank=2,4"]], ids=["single", "sweep"])
@pytest.mark.parametrize("engine", ["diffusers", "musubi"])
def test_a_dry_run_touches_nothing(
    first: tuple[Path, Finished], engine: str, sweep: list[str]
) -> None:
    cwd, _ = first
    archive = next(cwd.glob("*.zip")).name
    recipe = ["experiment=rehearsal"] if engine == "diffusers" else []
    before = tree(cwd)
    done = run_program(
        *recipe, *sweep, f"dataset.path={archive}", "dataset=zip", "dry_run=true", cwd=cwd
    )
    assert done.code == 0, done.err
    assert done.out.count("dry_run=true") == (2 if sweep else 1)
    assert "Commands (in the run's folder)" in done.out
    assert tree(cwd) == before
