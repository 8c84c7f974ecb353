"""Where a model's weights lie on this machine, and what it takes to have them; reads only."""

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
    """Where the weights are or will be, and the digest of each once they are there.

    ``commands`` bring them. ``tokenizer`` is the folder of the text encoder's, where it is on this
    machine. ``requests`` are the files of the hub among them. ``checked``: all that is here was
    read, and found whole.
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
        return self.digests is not None


# musubi-tuner loads these from the hub's cache while it runs, by the branch main. What it can't do
# without, and what it takes besides.
_QWEN = "Qwen/Qwen-Image"
_QWEN_FILES = (
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
)
_BYT5 = "google/byt5-small"
_BYT5_FILES = ("config.json", "tokenizer_config.json")


def hub_requests(model: ModelConfig, task: str) -> tuple[Request, ...]:
    """The files a task needs, by repository."""
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
            _QWEN,
            model.qwen_tokenizer_revision,
            _QWEN_FILES,
            ("tokenizer/*",),
            branch="main",
            option="model.qwen_tokenizer_revision",
        ),
        Request(
            _BYT5,
            model.byt5_tokenizer_revision,
            _BYT5_FILES,
            ("*.json",),
            branch="main",
            option="model.byt5_tokenizer_revision",
        ),
    )


def hub_weights(config: RunConfig, root: Path) -> LocatedWeights:
    """Where the weights of a model of the hub are or will be; reads only."""
    model, requests = config.model, hub_requests(config.model, config.task.name)
    cache = user_hub_cache(root)
    hub, encoders, qwen, byt5 = requests

    def path(request: Request, file: str) -> str:
        commit = cache.commit(request.repository, request.revision) or request.revision
        return str(cache.place(request.repository, commit, file))

    def digest(request: Request, *files: str) -> str | None:
        commit = cache.commit(request.repository, request.revision)
        found = [cache.find(request.repository, commit, file) for file in files]
        parts = [None if cached is None else cache.name_of(cached) for cached in found]
        if None in parts:
            return None
        # A tokenizer is several files; one digest of theirs stands for all.
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
    missing_files = sum(len(cache.missing_files(request)) for request in requests)
    unchecked = sum(cache.unchecked(request) for request in requests)
    complete = None not in digests.values() and all(cache.pointed(r) for r in requests)
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
        (_command(requests, cache, root, force="weights" in config.stages.force),),
        summary,
        find_tokenizer(model, root),
        requests,
        checked=not unchecked,
    )


def find_tokenizer(model: ModelConfig, root: Path) -> Path | None:
    """The folder of Qwen2.5-VL's tokenizer when it is in the hub's cache; never goes online."""
    cache = user_hub_cache(root)
    commit = cache.commit(_QWEN, model.qwen_tokenizer_revision)
    found = [cache.find(_QWEN, commit, file) for file in _QWEN_FILES]
    # The parent of the name in the snapshot, not of the blob that it leads to.
    return (
        None
        if commit is None or None in found
        else cache.place(_QWEN, commit, _QWEN_FILES[0]).parent
    )


def user_hub_cache(root: Path) -> HubCache:
    """The hub's cache, with what was checked noted below the output folder."""
    return HubCache.of_user(root / "cache" / "weights" / "checked")


def _joined(parts: Iterable[str | None]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _command(requests: Iterable[Request], cache: HubCache, root: Path, *, force: bool) -> Command:
    """What fetches them, at their commits where those are known; all are asked for together, so
    that one that can't be had is told before the first is fetched."""
    argv = [sys.executable, "-m", "runner.hub"]
    for number, request in enumerate(requests):
        commit = cache.commit(request.repository, request.revision)
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
