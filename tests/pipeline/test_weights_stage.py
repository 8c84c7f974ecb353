"""The weights stage on a hub on loopback: what is fetched, recorded, planned with, and loaded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TOP, compose
from hub_server import Hub, talk_to
from model_hub import (
    BYT5,
    COMMITS,
    DIFFUSERS,
    ENCODERS,
    MODEL,
    QWEN,
    content,
    model_hub,
    run,
    summary_rows,
)

from runner.core.errors import StageError
from runner.hub.weights import LocatedWeights, hub_requests, published_weights

__all__ = ("model_hub",)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)


# A dry run tells from the disk alone whether the weights are here; it asks and writes nothing.
@pytest.mark.usefixtures("no_network")
def test_facts_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk_to(Hub(), tmp_path, monkeypatch)
    facts = published_weights(compose(), tmp_path, whole=False)
    assert not facts.present
    assert facts.summary == f"9 files of {MODEL}, its encoders and tokenizers, 9 to fetch"
    assert facts.paths.vae.endswith(f"/snapshots/main/vae/{DIFFUSERS}")
    assert list(tmp_path.iterdir()) == []


# A task gets just its files: no image encoder for t2v, no other size, no other weights.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_only_what_the_task_needs(hub: Hub, tmp_path: Path, task: str) -> None:
    config = compose(f"task={task}", "model=hunyuan15_480p")
    run(config, tmp_path)
    fetched = {asked.path.split("/resolve/")[1] for asked in hub.downloads()}
    encoders = {config.model.text_encoder, config.model.byt5}
    if task == "i2v":
        encoders.add(config.model.image_encoder)
    tokenizers = {f"{COMMITS['Qwen/Qwen-Image']}/{n}" for n in QWEN if n.startswith("tokenizer/")}
    tokenizers |= {f"{COMMITS['google/byt5-small']}/{n}" for n in BYT5 if n.endswith(".json")}
    model = {f"transformer/480p_{task}/{DIFFUSERS}", f"vae/{DIFFUSERS}"}
    assert fetched == {*encoders, *tokenizers, *model}
    # Going on to the other task fetches only what that needs besides.
    hub.asked.clear()
    other = compose(f"task={'t2v' if task == 'i2v' else 'i2v'}", "model=hunyuan15_480p")
    run(other, tmp_path)
    assert len(hub.downloads()) == (1 if task == "i2v" else 2)


# What the run was trained on is written down, whole, and can be asked for again word for word.
def test_commit_is_recorded_and_can_be_asked_for(hub: Hub, tmp_path: Path) -> None:
    folder, tags, _ = run(compose(), tmp_path)
    del tags["config.fingerprint"]
    assert tags == {f"weights.{name}": commit for name, commit in COMMITS.items()}
    record = json.loads((folder / "weights.json").read_text())
    by_file = {row["file"]: row for row in record["files"]}
    vae = content(f"vae/{DIFFUSERS}")
    assert by_file[f"vae/{DIFFUSERS}"] == {
        "repository": MODEL,
        "revision": "main",
        "commit": COMMITS[MODEL],
        "file": f"vae/{DIFFUSERS}",
        "size": len(vae),
        "sha256": hashlib.sha256(vae).hexdigest(),
    }
    words = QWEN["tokenizer/vocab.json"].encode()
    assert by_file["tokenizer/vocab.json"]["sha256"] == hashlib.sha256(words).hexdigest()
    # The hub moves on; the recorded overrides still name the same files.
    hub.repositories[MODEL].commit = "9" * 40
    again = compose(*record["overrides"])
    assert {r.revision for r in hub_requests(again.model, "t2v")} == set(COMMITS.values())
    hub.asked.clear()
    folder_again, _, _ = run(again, tmp_path)
    assert hub.asked == []
    repeated = json.loads((folder_again / "weights.json").read_text())
    assert [r["sha256"] for r in repeated["files"]] == [r["sha256"] for r in record["files"]]


# After the stage, the run's own files name the commit and files that exist, and the plan's keys
# are made of the weights' digests.
def test_files_are_renewed_after_the_stage(hub: Hub, tmp_path: Path) -> None:
    config = compose("task=i2v")
    folder, _, before = run(config, tmp_path)
    train = (folder / "train.toml").read_text()
    assert "/snapshots/main/" in dict(before.files)["train.toml"]
    assert f"/snapshots/{COMMITS[MODEL]}/transformer/720p_i2v/" in train
    facts = summary_rows(config, tmp_path).weights
    assert isinstance(facts, LocatedWeights) and facts.digests is not None
    for path in vars(facts.paths).values():
        assert Path(path).is_file() and path in train
    image = hashlib.sha256(content(config.model.image_encoder)).hexdigest()
    assert facts.digests["image_encoder"] == image
    assert facts.digests["vae"] == hashlib.sha256(content(f"vae/{DIFFUSERS}")).hexdigest()
    # Another tokenizer makes other text embeddings, though the encoder is the same.
    other = hub.repositories["Qwen/Qwen-Image"]
    other.files["tokenizer/merges.txt"] = b"#version: 0.2\n"
    other.commit = "8" * 40
    config.model.qwen_tokenizer_revision = other.commit
    run(config, tmp_path)
    after = summary_rows(config, tmp_path).weights.digests
    changed = {part for part in facts.digests if facts.digests[part] != after[part]}
    assert changed == {"text_encoder"}


# commands.sh has the one command that ran, with the commits that the branches were; by hand it
# fetches the same, and what it prints is what the stage's log has.
def test_commands_by_hand(hub: Hub, tmp_path: Path) -> None:
    folder, _, _ = run(compose(), tmp_path)
    script = (folder / "commands.sh").read_text()
    words = shlex.split(script[script.index("env PYTHONPATH") : script.index("\n\n# dataset")])
    assert words[3:5] == ["-m", "runner.hub"] and words.count("--and") == 3
    named = [words[at + 1] for at, word in enumerate(words) if word == "--revision"]
    assert named == list(COMMITS.values())
    hub.asked.clear()
    cache = tmp_path / "by-hand"
    done = subprocess.run(
        ["sh", str(folder / "commands.sh")],
        env={**os.environ, "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (cache / "models--google--byt5-small/refs/main").read_text() == COMMITS[
        "google/byt5-small"
    ]
    log = (folder / "logs" / "weights.log").read_text()
    files = [line for line in done.stdout.splitlines() if line.endswith("bytes")]
    assert len(files) > 2 and set(files) <= set(log.splitlines())


# While the command runs, the run's console has what the command shows: the bar with sizes, and a
# line for each file; nothing of it stays in the run's folder but the log.
def test_progress_of_the_process(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.core.console.PLAIN_SECONDS", 0.0)
    file = f"transformer/720p_t2v/{DIFFUSERS}"
    hub.repositories[MODEL].files[file] = bytes(4_000_000)
    hub.seconds_per_piece = 0.03
    out = io.StringIO()
    folder, _, _ = run(compose(), tmp_path, out)
    shown = out.getvalue()
    total = sum(asked.sent for asked in hub.downloads())
    assert f"{len(hub.downloads())} files to fetch, {total / 1e6:.1f} MB" in shown
    moving = [line for line in shown.splitlines() if "MB/s" in line and line.endswith("left")]
    assert len(moving) > 2, shown
    assert f"\n      {file}  4.0 MB\n" in shown
    assert f"      fetched {total / 1e6:.1f} MB of {total / 1e6:.1f} MB" in shown
    assert not list(folder.glob("staging/weights*"))


# A token is given to the command by the environment, and is in no file of the run.
def test_the_token_is_not_in_the_command(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_let_me_in_0123456789")
    hub.repositories[MODEL].gated = True
    folder, _, _ = run(compose(), tmp_path)
    for file in folder.rglob("*"):
        assert not file.is_file() or b"hf_let_me_in" not in file.read_bytes()


# What another program has put into the cache is to be checked, by the same command; when it was,
# nothing is left to do and no command is in the script.
def test_done_is_what_was_checked(hub: Hub, tmp_path: Path) -> None:
    run(compose(), tmp_path)
    shutil.rmtree(tmp_path / "outputs" / "cache")
    hub.asked.clear()
    checked, _, plan = run(compose(), tmp_path)
    assert plan.stage("weights").summary.endswith(", 11 to check")
    assert "runner.hub" in (checked / "commands.sh").read_text()
    after, _, plan = run(compose(), tmp_path)
    assert plan.stage("weights").state == "done" and hub.asked == []
    assert "runner.hub" not in (after / "commands.sh").read_text()
    assert not (after / "logs" / "weights.log").exists()
    assert (after / "weights.json").read_text() == (checked / "weights.json").read_text()
    forced, _, _ = run(compose("stages.force=[weights]"), tmp_path)
    assert "--force" in (forced / "commands.sh").read_text()
    assert hub.asked and hub.downloads() == []


# The embedded engine, which reads these files itself, refuses a wrong one as soon as it is fetched:
# before anything is encoded.
def test_a_wrong_file_is_refused_when_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(StageError) as error:
        run(compose("engine=diffusers", "optimizer=adamw"), tmp_path)
    assert re.fullmatch(
        r"stage weights failed: .*/720p_t2v/\S+\.safetensors: it is not a safetensors file "
        r"\(56,000 bytes\) \(model\.transformer\): stages\.force=\[weights\] fetches it again\.",
        str(error.value),
    ), error.value
    assert hub.downloads()


_LOAD = """
import socket
def refused(*_):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
from transformers import AutoTokenizer
from transformers.models.qwen2 import Qwen2Tokenizer
qwen = Qwen2Tokenizer.from_pretrained("Qwen/Qwen-Image", subfolder="tokenizer")
byt5 = AutoTokenizer.from_pretrained("google/byt5-small")
print(qwen.tokenize("cat"), byt5("cat").input_ids)
from runner.engines.diffusers import published
qwen, byt5 = published.text_tokenizer(), published.byt5_tokenizer()
print(qwen.tokenize("cat"), byt5("cat").input_ids)
"""


# main of the cache is where the revision is, so that musubi-tuner, which asks by branch, finds the
# tokenizers offline; for a revision that is pinned by commit too, where the hub's own client would
# leave no branch behind. That one is loaded, as musubi-tuner does it and as the embedded engine
# does, with every socket refused.
@pytest.mark.parametrize("pinned", [False, True], ids=["branch", "commit"])
def test_tokenizers_load_offline(hub: Hub, tmp_path: Path, pinned: bool) -> None:
    config = compose()
    if pinned:
        config.model.qwen_tokenizer_revision = COMMITS["Qwen/Qwen-Image"]
        config.model.byt5_tokenizer_revision = COMMITS["google/byt5-small"]
    run(config, tmp_path)
    for name in ("Qwen/Qwen-Image", "google/byt5-small"):
        ref = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "refs" / "main"
        assert ref.read_text() == COMMITS[name]
    if not pinned:
        return
    environment = {
        **os.environ,
        "PYTHONPATH": str(TOP),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-c", _LOAD], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == 2 * "['cat'] [102, 100, 119, 1]\n"


# A cache whose files are here but whose main is not is not complete: musubi-tuner would fail in it.
def test_branch_is_part_of_complete(hub: Hub, tmp_path: Path) -> None:
    config = compose()
    config.model.byt5_tokenizer_revision = COMMITS["google/byt5-small"]
    run(config, tmp_path)
    (tmp_path / "hub/models--google--byt5-small/refs/main").unlink()
    assert not published_weights(config, tmp_path / "outputs", whole=False).present
    hub.asked.clear()
    run(config, tmp_path)
    assert published_weights(config, tmp_path / "outputs", whole=False).present
    assert hub.asked == []


# The stage's failure is the run's one line, and the run's record says so.
def test_stage_fails_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[ENCODERS].gated = True
    with pytest.raises(StageError, match=f"^stage weights failed: {ENCODERS} is gated") as caught:
        run(compose(), tmp_path)
    assert "\n" not in str(caught.value)
    assert hub.downloads() == []
    (record,) = (tmp_path / "outputs/runs").rglob("run.json")
    assert json.loads(record.read_text())["status"] == "FAILED"
