"""A dry run with the published weights in the hub's cache: their headers are checked first."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import Finished, compose, tree
from huggingface_hub import constants
from in_process import program_here
from other_processes import pictures
from sparse_weights import DTYPES, published, write_sparse

from runner.formats.published_layout import layout
from runner.hub.hub_cache import HubCache
from runner.hub.weights import hub_requests

COMMIT = "c" * 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, the published files at full size in a hub cache, and an H100."""
    pictures(tmp_path / "media", 1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = hub_cache(tmp_path)
    model = compose("model=hunyuan15_720p").model
    parts = {getattr(model, part): part for part in DTYPES}
    for request in hub_requests(model, "t2v"):
        for file in request.files:
            name = hashlib.sha256(file.encode()).hexdigest()
            blob = cache.blob(request.repository, name)
            blob.parent.mkdir(parents=True, exist_ok=True)
            if part := parts.get(file):
                published(part, blob)
            else:
                blob.write_text("{}")
            cache.link(request.repository, COMMIT, file, name)
            cache.remember(blob, name)
        (cache.of(request.repository) / "refs").mkdir()
        (cache.of(request.repository) / "refs" / "main").write_text(COMMIT)
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 9.0'\n")
    tool.chmod(0o755)
    return tmp_path


def hub_cache(place: Path) -> HubCache:
    return HubCache(place / "hub", place / "outputs" / "cache" / "weights" / "checked")


def file_of(place: Path, part: str) -> Path:
    model = compose("model=hunyuan15_720p").model
    repositories = {"transformer": model.repository, "vae": model.repository}
    repository = repositories.get(part, model.encoders_repository)
    return hub_cache(place).path(repository, COMMIT, getattr(model, part))


def dry_run(place: Path, *arguments: str) -> Finished:
    return program_here(
        *("engine=diffusers", "model=hunyuan15_720p", "optimizer=adamw", "tracking=none"),
        *("dataset.path=media", "dry_run=true", *arguments),
        cwd=place,
        env={"PATH": f"{place / 'bin'}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0"},
    )


# The published files, all five at their full size, pass; the plan has them as done, and nothing is
# written.
def test_the_published_files_pass(place: Path) -> None:
    before = tree(place)
    done = dry_run(place)
    assert done.code == 0, done.err
    assert "weights" in done.out and "to fetch" not in done.out and "to check" not in done.out
    assert tree(place) == before


# A wrong file is refused before any work, by its name and in one line.
def test_a_wrong_file_is_refused(place: Path) -> None:
    file = file_of(place, "text_encoder")
    write_sparse(file, layout("text_encoder"), "F8_E4M3")
    done = dry_run(place)
    assert done.code == 2
    assert done.err == (
        f"error: {file} is stored in fp8: model.text_encoder must be split_files/text_encoders/"
        "qwen_2.5_vl_7b.safetensors of Comfy-Org/HunyuanVideo_1.5_repackaged.\n"
    )


# A cut file is left to the weights stage, which verifies and fetches it again; without that stage
# it is refused.
def test_a_cut_file(place: Path) -> None:
    file = file_of(place, "transformer")
    with file.open("r+b") as handle:
        handle.truncate(10**9)
    done = dry_run(place)
    assert (done.code, done.err) == (0, "")
    assert "1 to check" in done.out
    done = dry_run(place, "stages.skip=[weights]")
    assert done.code == 2
    missing = f"{published('transformer', place / 'whole').stat().st_size - 10**9:,}"
    assert done.err == (
        f"error: {file}: the file is cut, {missing} bytes are missing (model.transformer): "
        "stages.force=[weights] fetches it again.\n"
    )
