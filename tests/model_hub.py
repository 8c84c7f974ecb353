"""The model's four repositories on a hub on loopback, and runs of the weights stage on it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item
from hub_server import Hub, Repository, serve, talk_to

from runner.config.schema import RunConfig
from runner.core.console import Console
from runner.engines.registry import engine_named
from runner.hub.weights import published_weights
from runner.pipeline.model import Plan

MODEL, ENCODERS = "tencent/HunyuanVideo-1.5", "Comfy-Org/HunyuanVideo_1.5_repackaged"
COMMITS = {
    MODEL: "1" * 40,
    ENCODERS: "2" * 40,
    "Qwen/Qwen-Image": "3" * 40,
    "google/byt5-small": "4" * 40,
}
BYTES = [chr(code) for code in range(33, 127)]
QWEN = {
    "tokenizer/vocab.json": json.dumps({c: n for n, c in enumerate([*BYTES, "Ġ", "ca", "cat"])}),
    "tokenizer/merges.txt": "#version: 0.2\nc a\nca t\n",
    "tokenizer/tokenizer_config.json": json.dumps(
        {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 1024, "unk_token": None}
    ),
    "tokenizer/added_tokens.json": json.dumps({"<|im_end|>": 97}),
    "transformer/config.json": "{}",
}
BYT5 = {
    "config.json": json.dumps({"model_type": "t5"}),
    "tokenizer_config.json": json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}),
    "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
    "pytorch_model.bin": "not wanted",
}


def content(name: str) -> bytes:
    return (name * 1000).encode()


@pytest.fixture(name="hub")
def model_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """All four repositories as the runner knows them, every file of both tasks and sizes."""
    model = {f"transformer/{size}_{task}" for size in ("480p", "720p") for task in ("t2v", "i2v")}
    folders = [*sorted(model), "vae"]
    files = {name: content(name) for f in folders for name in [f"{f}/{DIFFUSERS}"]}
    config = compose("task=i2v").model
    encoders = [config.text_encoder, config.byt5, config.image_encoder, "split_files/other.bin"]
    served = Hub(
        {
            MODEL: Repository(files, COMMITS[MODEL]),
            ENCODERS: Repository({name: content(name) for name in encoders}, COMMITS[ENCODERS]),
            "Qwen/Qwen-Image": Repository(
                {name: text.encode() for name, text in QWEN.items()}, COMMITS["Qwen/Qwen-Image"]
            ),
            "google/byt5-small": Repository(
                {name: text.encode() for name, text in BYT5.items()}, COMMITS["google/byt5-small"]
            ),
        }
    )
    with serve(served):
        talk_to(served, tmp_path, monkeypatch)
        yield served


DIFFUSERS = "diffusion_pytorch_model.safetensors"


def run(
    config: RunConfig, tmp_path: Path, out: io.StringIO | None = None
) -> tuple[Path, Any, Plan]:
    """A run of the weights stage alone, as ``python -m runner`` does it; its folder and tags.

    The clip is not looked at, and musubi-tuner is not asked whether it is whole.
    """
    from omegaconf import OmegaConf

    from runner.config.composed import Composed
    from runner.engines.musubi.engine import MusubiEngine
    from runner.pipeline.executor import Prepared, execute
    from runner.pipeline.plan import make_plan
    from runner.tracking.mlflow_run import NullWriter

    config.stages.skip = ["dataset", "latents", "text", "train", "convert", "evaluate"]
    config.tracking.name = "none"
    facts = summary_rows(config, tmp_path)
    engine = engine_named(config.engine.name)
    plan = make_plan(facts, engine)
    resolved: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    console = Console.for_stream(out or io.StringIO())
    tags: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NullWriter, "set_tags", lambda _, values: tags.update(values))
        patch.setattr(MusubiEngine, "check", lambda *_, **__: "engine 1")
        execute(Prepared(Composed(config, resolved, (), {}), facts, engine, plan), console, None)
    (folder,) = sorted((tmp_path / "outputs" / "runs").glob("*/*"))[-1:]
    return folder, tags, plan


def summary_rows(config: RunConfig, tmp_path: Path) -> Any:
    from dataclasses import replace

    root = tmp_path / "outputs"
    facts = fake_facts(config, [fake_item("clip.mp4")])
    return replace(facts, root=root, weights=published_weights(config, root, whole=False))
