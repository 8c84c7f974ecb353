"""The weights stage: have the model's files on this machine."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.commands import Command
from runner.config import ModelConfig, RunConfig
from runner.errors import StageError
from runner.formats.train_toml import WeightPaths
from runner.plan import WeightFacts
from runner.process import run as run_command

if TYPE_CHECKING:
    from runner.execute import Context

# Raised when the tiny model's random weights change.
TINY_VERSION = 1


def weight_facts(config: RunConfig, root: Path) -> WeightFacts:
    """Where the weights are or will be; reads only."""
    if config.model.source == "random":
        return _tiny(config, root)
    return _hub(config)


def _tiny(config: RunConfig, root: Path) -> WeightFacts:
    from runner.engines.diffusers.commands import DiffusersEngine
    from runner.engines.diffusers.make_weights import PARTS
    from runner.facts import engine_facts

    folder = root / "cache" / "weights" / f"tiny-{TINY_VERSION}"
    transformer = f"transformer/{config.task.name}"
    paths = WeightPaths(
        transformer=str(folder / transformer / "diffusion_pytorch_model.safetensors"),
        vae=str(folder / "vae"),
        text_encoder=str(folder / "text_encoder"),
        byt5=str(folder / "byt5"),
        image_encoder=str(folder / "image_encoder"),
    )
    digests: dict[str, str] | None = None
    if all((folder / part).is_file() for part in PARTS):
        digests = {
            "transformer": _digest(folder / transformer),
            **{
                part: _digest(folder / part)
                for part in ("vae", "text_encoder", "byt5", "image_encoder")
            },
        }
    command = DiffusersEngine(engine_facts(config, root)).make_weights(str(folder))
    return WeightFacts(paths, digests, (command,), "random weights of the tiny model")


def _digest(folder: Path) -> str:
    """One digest of all files in a folder; the tiny model's are small enough to read each time."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(folder).as_posix()}\0".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def hub_files(model: ModelConfig, task: str) -> list[tuple[str, str, str, str]]:
    """``(part, repository, revision, file)`` of each file the task needs."""
    encoders = (model.encoders_repository, model.encoders_revision)
    files = [
        ("transformer", model.repository, model.revision, model.transformer),
        ("vae", model.repository, model.revision, model.vae),
        ("text_encoder", *encoders, model.text_encoder),
        ("byt5", *encoders, model.byt5),
    ]
    if task == "i2v":
        files.append(("image_encoder", *encoders, model.image_encoder))
    return files


# musubi-tuner loads these from the hub's cache while it runs.
TOKENIZERS = (("Qwen/Qwen-Image", "tokenizer/*"), ("google/byt5-small", "*.json"))


def _hub(config: RunConfig) -> WeightFacts:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    files = hub_files(config.model, config.task.name)
    paths: dict[str, str] = {}
    digests: dict[str, str] = {}
    for part, repository, revision, file in files:
        cached = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            paths[part] = cached
            # The hub's cache names a large file's blob by its sha256.
            digests[part] = Path(cached).resolve().name
        else:
            folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
            paths[part] = str(folder / "snapshots" / revision / file)
    commands = tuple(
        Command((_hf(), "download", repository, file, "--revision", revision))
        for _, repository, revision, file in files
    ) + tuple(
        Command((_hf(), "download", repository, "--include", pattern))
        for repository, pattern in TOKENIZERS
    )
    return WeightFacts(
        WeightPaths(
            transformer=paths["transformer"],
            vae=paths["vae"],
            text_encoder=paths["text_encoder"],
            byt5=paths["byt5"],
            image_encoder=paths.get("image_encoder", ""),
        ),
        digests if len(digests) == len(files) else None,
        commands,
        f"{len(files)} files of {config.model.repository} and its encoders",
    )


def _hf() -> str:
    beside = Path(sys.executable).with_name("hf")
    return str(beside) if beside.exists() else "hf"


def run(context: Context) -> None:
    """Make or fetch what is missing.

    Raises :class:`StageError` when a command fails or leaves the weights incomplete.
    """
    if context.facts.weights.present:
        return
    for command in context.plan.stage("weights").commands:
        run_command(
            command.argv,
            cwd=context.run_dir,
            env=command.environment(os.environ),
            log=context.log("weights"),
        )
    if not weight_facts(context.config, context.facts.root).present:
        raise StageError(f"the weights are still incomplete; see {context.log('weights')}")
