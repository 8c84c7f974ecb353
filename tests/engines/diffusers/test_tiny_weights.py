"""The tiny networks: the same on every machine, whole or absent, and fit to train on."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runner.core.errors import UserError
from runner.engines.diffusers import make_weights as maker
from runner.engines.diffusers import models


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert maker.make_weights(folder)
    # Making weights takes no random numbers from whoever asks for them.
    assert torch.equal(torch.get_rng_state(), before)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# Every run makes the same bytes, whatever the process, its hash seed or the place: caches are
# keyed by the weights' hashes.
def test_every_run_makes_the_same_bytes(weights: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / "w"
    subprocess.run(
        [sys.executable, "-m", maker.__name__, "--output", str(again)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert digests(again) == digests(weights)
    assert set(maker.PARTS) <= digests(weights).keys()


# A finished folder is left alone; one of something else is not overwritten.
def test_existing_folders(weights: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in weights.rglob("*")}
    assert not maker.make_weights(weights)
    assert {file: file.stat().st_mtime_ns for file in weights.rglob("*")} == before

    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match="photos"):
        maker.make_weights(other)
    assert [file.name for file in other.iterdir()] == ["cat.png"]


# Interrupted work leaves nothing behind that looks finished, and nothing to clean up.
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path, *, seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(maker, "_make_image_encoder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        maker.make_weights(tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []


# All five networks load from their folders alone: no look-up leaves the machine.
def test_loading_needs_no_network(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    networks = [
        models.load_vae(weights / "vae"),
        models.load_transformer(weights / "transformer" / "t2v"),
        models.load_text_encoder(weights / "text_encoder")[1],
        models.load_byt5(weights / "byt5")[1],
        models.load_image_encoder(weights / "image_encoder")[1],
    ]
    for network in networks:
        assert not network.training
        assert {value.dtype for value in network.parameters()} == {torch.float32}


# The transformer's file has Tencent's names, as the published weights do, and the two tasks'
# networks differ, so that taking one for the other shows.
def test_transformer_files(weights: Path) -> None:
    from safetensors.torch import load_file

    states = [
        load_file(weights / "transformer" / task / models.TRANSFORMER_FILE)
        for task in ("t2v", "i2v")
    ]
    for name in (
        "double_blocks.1.img_attn_q.weight",
        "double_blocks.1.txt_mlp.fc2.bias",
        "final_layer.linear.weight",
    ):
        assert not torch.equal(states[0][name], states[1][name])
    assert states[0].keys() == states[1].keys()
    assert not any(name.startswith("transformer_blocks") for name in states[0])


# The prediction is of the size of what training compares it to (noise minus latents), at every
# timestep, and depends on picture, caption and timestep.
def test_predictions_are_sane(weights: Path) -> None:
    model = models.load_transformer(weights / "transformer" / "i2v" / models.TRANSFORMER_FILE)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def predict(latents: torch.Tensor, text: torch.Tensor, timestep: float) -> torch.Tensor:
        result: torch.Tensor = model(
            latents,
            torch.tensor([timestep]),
            text,
            torch.ones(1, text.shape[1]),
            encoder_hidden_states_2=torch.zeros(1, 1, 32),
            encoder_attention_mask_2=torch.zeros(1, 1),
            image_embeds=torch.zeros(1, 1, 32),
        ).sample
        return result

    latents, other, text, caption = (
        noise(1, 65, 2, 3, 4),
        noise(1, 65, 2, 3, 4),
        noise(1, 9, 64),
        noise(1, 5, 64),
    )
    base = predict(latents, text, 500.0)
    assert base.shape == (1, 32, 2, 3, 4)
    for prediction in (base, predict(latents, text, 1.0), predict(latents, text, 1000.0)):
        assert 0.05 < prediction.std() < 1.0
    for changed in (
        predict(other, text, 500.0),
        predict(latents, caption, 500.0),
        predict(latents, text, 100.0),
    ):
        assert (changed - base).std() > 1e-3


# Every caption has an encoding that gives it back, and the template's marks are single tokens.
def test_tokenizer(weights: Path) -> None:
    tokenizer, _ = models.load_text_encoder(weights / "text_encoder")
    for token in maker.SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
    for text in ("a photo of a cat", "  two\n\nlines ", "日本 “é” 🐇 [x]{y}", "<|im_start|>user\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# A folder without the network, or with a damaged one, is named in one line.
def test_unusable_folders_are_named(weights: Path, tmp_path: Path) -> None:
    loaders = (
        models.load_vae,
        models.load_transformer,
        models.load_text_encoder,
        models.load_byt5,
        models.load_image_encoder,
    )
    for load in loaders:
        with pytest.raises(UserError, match="nowhere"):
            load(tmp_path / "nowhere")
    shutil.copytree(weights / "vae", tmp_path / "vae")
    shutil.copytree(weights / "transformer" / "t2v", tmp_path / "t2v")
    for folder, load_damaged in (("vae", models.load_vae), ("t2v", models.load_transformer)):
        file = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(UserError, match=folder) as raised:
            load_damaged(tmp_path / folder)
        assert "\n" not in str(raised.value)
