"""A model's weights: their paths on this computer, and how to fetch them. Reads only."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner.config.schema import ModelConfig, RunConfig
from runner.core.command import Command
from runner.core.paths import checkout
from runner.formats.train_toml import WeightPaths
from runner.hub.hub_cache import HubCache, Request


@dataclass(frozen=True)
class LocatedWeights:
    """The paths that the weights have or will have, and how to fetch them.

    Attributes:
        paths: the files' paths.
        digests: a digest for each part; None while something is missing.
        commands: the commands that fetch them.
        summary: a line about them, for plans.
        tokenizer: the folder of the text encoder's tokenizer, if it is on this computer.
        requests: those of the files that are on the hub.
        checked: whether all cached files were verified.
    """

    paths: WeightPaths
    digests: dict[str, str] | None
    commands: tuple[Command, ...]
    summary: str
    tokenizer: Path | None = None
    requests: tuple[Request, ...] = ()
    checked: bool = True

    @property
    def present(self) -> bool:
        """Whether nothing is missing."""
        return self.digests is not None


# musubi-tuner itself loads these from the Hugging Face cache, at the branch main: these files, and
# optional ones (the patterns of their requests).
QWEN_TOKENIZER = "Qwen/Qwen-Image"
_QWEN_FILES = (
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
)
BYT5_TOKENIZER = "google/byt5-small"
_BYT5_FILES = ("config.json", "tokenizer_config.json")


def hub_requests(model: ModelConfig, task: str) -> tuple[Request, ...]:
    """List the files that a task needs, one request per repository."""
    encoders: tuple[str, ...] = (model.text_encoder, model.byt5)
    if task == "i2v":
        encoders = (*encoders, model.image_encoder)
    return (
        Request(
            model.repository,
            model.revision,
            (model.transformer, model.vae),
            option="model.revision",
        ),
        Request(
            model.encoders_repository,
            model.encoders_revision,
            encoders,
            option="model.encoders_revision",
        ),
        Request(
            QWEN_TOKENIZER,
            model.qwen_tokenizer_revision,
            _QWEN_FILES,
            ("tokenizer/*",),
            branch="main",
            option="model.qwen_tokenizer_revision",
        ),
        Request(
            BYT5_TOKENIZER,
            model.byt5_tokenizer_revision,
            _BYT5_FILES,
            ("*.json",),
            branch="main",
            option="model.byt5_tokenizer_revision",
        ),
    )


def hub_weights(config: RunConfig, root: Path) -> LocatedWeights:
    """Locate the weights of a model that is on the hub; reads only."""
    model, requests = config.model, hub_requests(config.model, config.task.name)
    hub_cache = user_hub_cache(root)
    hub, encoders, qwen, byt5 = requests

    def path(request: Request, file: str) -> str:
        commit = hub_cache.commit(request.repository, request.revision) or request.revision
        return str(hub_cache.path(request.repository, commit, file))

    def digest(request: Request, *files: str) -> str | None:
        commit = hub_cache.commit(request.repository, request.revision)
        hub_files = [hub_cache.find(request.repository, commit, file) for file in files]
        parts = [None if one is None else hub_cache.name_of(one) for one in hub_files]
        if None in parts:
            return None
        # A tokenizer is several files, which get one digest.
        return parts[0] if len(parts) == 1 else _joined(parts)

    i2v = config.task.name == "i2v"
    texts = digest(encoders, model.text_encoder), digest(qwen, *qwen.files)
    glyphs = digest(encoders, model.byt5), digest(byt5, *byt5.files)
    digests = {
        "transformer": digest(hub, model.transformer),
        "vae": digest(hub, model.vae),
        "text_encoder": None if None in texts else _joined(texts),
        "byt5": None if None in glyphs else _joined(glyphs),
    }
    if i2v:
        digests["image_encoder"] = digest(encoders, model.image_encoder)
    missing_files = sum(len(hub_cache.missing_files(request)) for request in requests)
    unchecked = sum(hub_cache.unchecked(request) for request in requests)
    complete = None not in digests.values() and all(hub_cache.pointed(r) for r in requests)
    number = sum(len(request.files) for request in requests)
    summary = f"{number} files of {model.repository}, its encoders and tokenizers"
    if missing_files:
        summary += f", {missing_files} to fetch"
    if unchecked:
        summary += f", {unchecked} to check"
    return LocatedWeights(
        WeightPaths(
            transformer=path(hub, model.transformer),
            vae=path(hub, model.vae),
            text_encoder=path(encoders, model.text_encoder),
            byt5=path(encoders, model.byt5),
            image_encoder=path(encoders, model.image_encoder) if i2v else "",
        ),
        {part: value for part, value in digests.items() if value} if complete else None,
        (_command(requests, hub_cache, root, force="weights" in config.stages.force),),
        summary,
        find_tokenizer(model, root),
        requests,
        checked=not unchecked,
    )


def find_tokenizer(model: ModelConfig, root: Path) -> Path | None:
    """Return the folder of Qwen2.5-VL's tokenizer, or None if it is not cached."""
    hub_cache = user_hub_cache(root)
    commit = hub_cache.commit(QWEN_TOKENIZER, model.qwen_tokenizer_revision)
    hub_files = [hub_cache.find(QWEN_TOKENIZER, commit, file) for file in _QWEN_FILES]
    # The folder in the snapshot, not that of the blobs.
    return (
        None
        if commit is None or None in hub_files
        else hub_cache.path(QWEN_TOKENIZER, commit, _QWEN_FILES[0]).parent
    )


def user_hub_cache(root: Path) -> HubCache:
    """Open the Hugging Face cache, with notes on verified files in the output folder."""
    return HubCache.of_user(root / "cache" / "weights" / "checked")


def _joined(parts: Iterable[str | None]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _command(
    requests: Iterable[Request], hub_cache: HubCache, root: Path, *, force: bool
) -> Command:
    """Build the one command for all requests, so that each is checked before any is fetched."""
    argv = [sys.executable, "-m", "runner.hub"]
    for number, request in enumerate(requests):
        commit = hub_cache.commit(request.repository, request.revision)
        argv += ["--and"] * (number > 0) + [request.repository]
        argv += ["--revision", commit or request.revision, "--named", request.option]
        for pattern in request.patterns:
            argv += ["--include", pattern]
        if request.branch is not None:
            argv += ["--branch", request.branch]
        if number == 0:
            argv += ["--checked", str(root / "cache" / "weights" / "checked")]
            argv += ["--force"] * force
        argv += ["--", *request.files]
    path = checkout()
    return Command(tuple(argv), set_env=(("PYTHONPATH", path),) if path else ())
