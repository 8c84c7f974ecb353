"""The weights stage: have the model's files on this machine."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config.schema import ModelConfig, RunConfig
from runner.core.atomic import write_text
from runner.core.command import Command
from runner.core.errors import StageError
from runner.formats.train_toml import WeightPaths
from runner.hub.cache import HubCache, Request
from runner.pipeline.model import WeightFacts
from runner.pipeline.stages import run_commands

if TYPE_CHECKING:
    from runner.hub.fetch import Obtained
    from runner.pipeline.executor import Context

# Raised when the tiny model's random weights change.
TINY_VERSION = 1


def weight_facts(config: RunConfig, root: Path) -> WeightFacts:
    """Where the weights are or will be; reads only."""
    if config.model.source == "random":
        return _tiny(config, root)
    return _hub(config, root)


def _tiny(config: RunConfig, root: Path) -> WeightFacts:
    from runner.engines.diffusers.engine import DiffusersEngine
    from runner.engines.diffusers.make_weights import PARTS
    from runner.pipeline.inputs import engine_facts

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


def _hub(config: RunConfig, root: Path) -> WeightFacts:
    model, requests = config.model, hub_requests(config.model, config.task.name)
    cache = _cache(root)
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
    lacking = sum(len(cache.lacking(request)) for request in requests)
    complete = None not in digests.values() and all(cache.pointed(r) for r in requests)
    number = sum(len(request.files) for request in requests)
    summary = f"{number} files of {model.repository}, its encoders and tokenizers"
    if lacking:
        summary += f", {lacking} to fetch"
    return WeightFacts(
        WeightPaths(
            transformer=path(hub, model.transformer),
            vae=path(hub, model.vae),
            text_encoder=path(encoders, model.text_encoder),
            byt5=path(encoders, model.byt5),
            image_encoder=path(encoders, model.image_encoder) if i2v else "",
        ),
        {part: value for part, value in digests.items() if value} if complete else None,
        tuple(_by_hand(request, cache, root) for request in requests),
        summary,
    )


def find_tokenizer(model: ModelConfig, root: Path) -> Path | None:
    """The folder of Qwen2.5-VL's tokenizer when it is in the hub's cache; never goes online."""
    cache = _cache(root)
    commit = cache.commit(_QWEN, model.qwen_tokenizer_revision)
    found = [cache.find(_QWEN, commit, file) for file in _QWEN_FILES]
    # The parent of the name in the snapshot, not of the blob that it leads to.
    return (
        None
        if commit is None or None in found
        else cache.place(_QWEN, commit, _QWEN_FILES[0]).parent
    )


def _cache(root: Path) -> HubCache:
    return HubCache.of_user(root / "cache" / "weights" / "checked")


def _joined(parts: Iterable[str | None]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _by_hand(request: Request, cache: HubCache, root: Path) -> Command:
    """The command that does for one repository what the stage does, at the commit if known."""
    from runner.core.paths import checkout

    commit = cache.commit(request.repository, request.revision)
    argv = [sys.executable, "-m", "runner.hub", request.repository]
    argv += ["--revision", commit or request.revision]
    for pattern in request.patterns:
        argv += ["--include", pattern]
    if request.branch is not None:
        argv += ["--branch", request.branch]
    argv += ["--checked", str(root / "cache" / "weights" / "checked"), "--", *request.files]
    path = checkout()
    return Command(tuple(argv), set_env=(("PYTHONPATH", path),) if path else ())


def run(context: Context) -> None:
    """Make or fetch what is missing, and write down what was found in ``weights.json``.

    Raises :class:`StageError` when that fails or leaves the weights incomplete.
    """
    if context.config.model.source == "random":
        _make(context)
    else:
        _fetch(context)


def _make(context: Context) -> None:
    if context.facts.weights.present:
        return
    run_commands(context, context.plan.stage("weights"))
    if not weight_facts(context.config, context.facts.root).present:
        raise StageError(f"the weights are still incomplete; see {context.log('weights')}")


def _fetch(context: Context) -> None:
    from runner.hub.fetch import obtain
    from runner.hub.log import hub_log
    from runner.hub.progress import Shown

    requests = hub_requests(context.config.model, context.config.task.name)
    force = "weights" in context.config.stages.force
    with hub_log(context.log("weights")), Shown(context.console) as shown:
        found = obtain(requests, _cache(context.facts.root), shown, force=force)
    if not weight_facts(context.config, context.facts.root).present:
        raise StageError("the weights are incomplete though all was fetched: start again.")
    write_text(context.run_dir / "weights.json", weights_json(found))
    commits = {file.repository: file.commit for file in found}
    context.writer.set_tags({f"weights.{name}": commit for name, commit in commits.items()})


def weights_json(found: Sequence[Obtained]) -> str:
    """What a run was trained on, and the overrides that ask for just that again."""
    again = sorted({f"{file.option}={file.commit}" for file in found})
    files = [
        {
            "repository": file.repository,
            "revision": file.revision,
            "commit": file.commit,
            "file": file.file,
            "size": file.size,
            "sha256": file.sha256,
        }
        for file in found
    ]
    return json.dumps({"overrides": again, "files": files}, indent=1) + "\n"
