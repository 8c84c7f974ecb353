"""Weights on this computer, from the options to the records: hashed once, and never the hub's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import compose, plan_of
from hub_server import Hub
from model_hub import COMMITS, ENCODERS, MODEL, model_hub, run, summary_rows
from sparse_weights import published, write_sparse

from runner.config.composed import Composed
from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.engines.musubi.weights import model_weights
from runner.formats.published_check import PART_NAMES
from runner.formats.published_layout import layout
from runner.hub.hub_cache import read_sha256
from runner.hub.weights import hub_requests, published_weights, user_hub_cache
from runner.pipeline.inputs import refusal
from runner.pipeline.option_paths import resolve_weights
from runner.pipeline.record import parameters

__all__ = ("model_hub",)


def resolved(cwd: Path, *overrides: str) -> RunConfig:
    return resolve_weights(compose(*overrides), overrides, cwd).config


@pytest.fixture
def byt5(tmp_path: Path) -> Path:
    return published("byt5", tmp_path / "my models" / "glyphs.safetensors", whole=True)


# A local file is hashed by the stage, in the run's log and once, and every record has its path and
# SHA-256 and no repository; what is the hub's stays the hub's.
def test_a_local_file_is_recorded(hub: Hub, tmp_path: Path, byt5: Path) -> None:
    config = resolved(tmp_path, "model.byt5=./my models/glyphs.safetensors")
    assert config.model.byt5 == str(byt5)
    folder, tags, plan = run(config, tmp_path)
    sha256, _ = read_sha256(byt5, None, lambda _: None)
    assert plan.stage("weights").summary == (
        f"ByT5 encoder on this computer; 8 files of {MODEL}, {ENCODERS}, Qwen/Qwen-Image, "
        "google/byt5-small, 8 to fetch, 1 to hash"
    )
    local = {
        "part": "byt5",
        "source": "local",
        "file": str(byt5),
        "size": byt5.stat().st_size,
        "sha256": sha256,
    }
    record = json.loads((folder / "weights.json").read_text())
    assert [file for file in record["files"] if file.get("repository") is None] == [local]
    assert f"model.byt5={byt5}" in record["overrides"]
    assert not any("byt5_small" in file["file"] for file in record["files"])
    assert tags["weights.byt5"] == f"local {sha256} {byt5}"
    assert tags[f"weights.{ENCODERS}"] == COMMITS[ENCODERS]
    assert json.loads((folder / "run.json").read_text())["local_weights"] == [local]
    assert f"{sha256}  {byt5}" in (folder / "logs" / "weights.log").read_text()
    assert str(byt5) in (folder / "train.toml").read_text()
    assert "runner.hub.local_files" in (folder / "commands.sh").read_text()
    assert not any("byt5_small" in asked.path for asked in hub.downloads())
    # Another run reads neither the file nor the hub.
    hub.asked.clear()
    _, _, plan = run(config, tmp_path)
    assert plan.stage("weights").state == "done" and hub.asked == []
    config = resolved(tmp_path, f"model.byt5={byt5}", "stages.force=[weights]")
    forced = summary_rows(config, tmp_path)
    forced = replace(forced, weights=replace(forced.weights, notices=("noticed",)))
    assert plan_of(config, forced).stage("weights").notices == ("noticed",)
    assert forced.weights.present and plan_of(config, forced).stage("weights").state == "to run"
    assert "--force" in forced.weights.commands[0].argv


# A file that was changed is noticed: it is hashed again, and other captions are encoded.
def test_a_changed_file_is_noticed(hub: Hub, tmp_path: Path, byt5: Path) -> None:
    config = resolved(tmp_path, f"model.byt5={byt5}")
    run(config, tmp_path)
    before = summary_rows(config, tmp_path).weights.digests
    with byt5.open("r+b") as handle:
        handle.seek(-2, 2)
        handle.write(b"xy")
    unknown = summary_rows(config, tmp_path)
    assert not unknown.weights.present
    config.stages.skip = ["weights"]
    line = refusal(config, unknown)
    assert line == "stages.skip=[weights], but model.byt5 must be hashed once."
    config.stages.skip = []
    _, _, plan = run(config, tmp_path)
    assert plan.stage("weights").summary.endswith("1 to hash")
    after = summary_rows(config, tmp_path).weights.digests
    assert {part for part in before if before[part] != after[part]} == {"byt5"}


# A local file with the bytes of the hub's file shares its digest, and so its cache entries.
def test_the_same_bytes_have_the_same_digest(hub: Hub, tmp_path: Path, byt5: Path) -> None:
    sha256, _ = read_sha256(byt5, None, lambda _: None)
    root = tmp_path / "outputs"
    cache = user_hub_cache(root)
    blob = cache.blob(ENCODERS, sha256)
    blob.parent.mkdir(parents=True)
    blob.hardlink_to(byt5)
    local = resolved(tmp_path, f"model.byt5={byt5}")
    run(local, tmp_path)
    cache.link(ENCODERS, COMMITS[ENCODERS], compose().model.byt5, sha256)
    theirs = published_weights(compose(), root, whole=True)
    assert theirs.present
    assert theirs.digests == published_weights(local, root, whole=True).digests
    assert Path(theirs.paths.byt5).resolve() == blob and not theirs.local


# With every part on this computer the hub is asked for tokenizers alone, and no record names the
# repositories of the others.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_everything_local(tmp_path: Path, task: str) -> None:
    parts = [part for part in PART_NAMES if task == "i2v" or part != "image_encoder"]
    files = [published(part, tmp_path / f"{part}.safetensors", whole=True) for part in parts]
    config = resolved(tmp_path, f"task={task}", "model.folder=.")
    asked = [request.repository for request in hub_requests(config.model, task)]
    assert asked == ["Qwen/Qwen-Image", "google/byt5-small"]
    facts = summary_rows(config, tmp_path)
    assert [file.path for file in facts.weights.local] == files
    assert MODEL not in facts.weights.summary and ENCODERS not in facts.weights.summary
    # What may fail at once, without the network, comes before minutes of hashing.
    modules = [command.argv[2] for command in facts.weights.commands]
    assert modules == ["runner.hub", "runner.hub.local_files"]
    texts = [str(command) for command in facts.weights.commands]
    assert not any(MODEL in text or ENCODERS in text for text in texts)
    composed = Composed(config, {"model": asdict(config.model)}, (), {})
    logged = parameters(composed, facts)
    assert logged["model.transformer"] == str(files[0])
    assert not {"model.repository", "model.revision", "model.encoders_repository"} & logged.keys()


# A part that an option names is not looked for in the folder, be it a path or a file of the hub; an
# option that then does nothing gets a notice.
def test_an_option_wins_over_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for part in ("transformer", "vae", "byt5"):
        published(part, folder / f"{part}.safetensors", whole=True)
    mine = published("vae", tmp_path / "mine.safetensors")
    hub_file = compose().model.byt5
    overrides = (
        *("model.folder=./models", "model.vae=./mine.safetensors", f"model.byt5={hub_file}"),
        *("model.revision=v2", "model.encoders_revision=v3"),
    )
    found = resolve_weights(compose(*overrides), overrides, tmp_path)
    model = found.config.model
    assert model.transformer == str(folder / "transformer.safetensors")
    assert (model.vae, model.byt5) == (str(mine), hub_file)
    assert (model.repository, model.revision, model.encoders_revision) == ("", "", "v3")
    assert found.notices == (
        "model.folder: not in it, so from the hub: the text encoder.",
        "model.revision does nothing: all of its files are on this computer.",
    )


# What is not this model's, damaged or gone is refused before any work; fp16 weights where
# musubi-tuner would refuse them, by their header and not by their name.
def test_a_local_file_is_checked(tmp_path: Path) -> None:
    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as error:
            model_weights(resolved(tmp_path, *overrides), tmp_path / "outputs")
        return str(error.value)

    vae = write_sparse(tmp_path / "vae.safetensors", {"encoder.x": (2, 2)}, "F16")
    assert refused("model.vae=./vae.safetensors") == (
        f"{vae} is another model's file, with none of the tensors of HunyuanVideo 1.5's VAE: "
        "model.vae must be vae/diffusion_pytorch_model.safetensors of tencent/HunyuanVideo-1.5."
    )
    cut = published("vae", tmp_path / "cut.safetensors")
    with cut.open("r+b") as handle:
        handle.truncate(10**6)
    assert refused("model.vae=./cut.safetensors").endswith(
        "bytes are missing (model.vae): copy it here again."
    )
    # What only musubi-tuner reads may be missing for the embedded engine.
    for part, line in (
        ("text_encoder", "lacks 391 of the 729 tensors of HunyuanVideo 1.5's text encoder"),
        ("byt5", "is not HunyuanVideo 1.5's ByT5 encoder: shared.weight is [384, 1472], not"),
    ):
        published(part, tmp_path / f"{part}.safetensors")
        override = f"model.{part}=./{part}.safetensors"
        assert line in refused(override)
        config = resolved(tmp_path, override)
        assert published_weights(config, tmp_path / "outputs", whole=False).local[0].part == part
    half = write_sparse(tmp_path / "bf16.safetensors", layout("transformer"), "F16")
    assert refused("model.transformer=./bf16.safetensors") == (
        f"model.transformer={half} holds fp16 weights, which can't be trained in precision=bf16: "
        "take precision=fp16, or a bf16 file."
    )
    full = published("transformer", tmp_path / "not_fp16.safetensors")
    for overrides in (
        ("model.transformer=./bf16.safetensors", "precision=fp16"),
        (f"model.transformer={full}",),
    ):
        config = resolved(tmp_path, *overrides)
        located = model_weights(config, tmp_path / "outputs")
        assert located.paths.transformer == config.model.transformer
