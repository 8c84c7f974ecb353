"""A model's weights: their paths on this computer, and how to fetch or hash them. Reads only."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.config.schema import ModelConfig, RunConfig
from runner.core.command import Command
from runner.core.paths import checkout
from runner.core.text import counted
from runner.formats.published_check import PART_NAMES
from runner.formats.train_toml import WeightPaths
from runner.hub.hub_cache import HubCache, Request
from runner.hub.local_files import Hashes, LocalFile, checked_file, is_local


@dataclass(frozen=True)
class LocatedWeights:
    """The paths that the weights have or will have, and how to fetch them.

    Attributes:
        paths: the files' paths.
        digests: a digest for each part; None while something is missing, or was not hashed.
        commands: the commands that fetch and hash them.
        summary: a line about them, for plans.
        tokenizer: the folder of the text encoder's tokenizer, if it is on this computer.
        requests: those of the files that are on the hub.
        checked: whether all cached files were verified.
        local: the parts that options name as files of this computer, and which are not the hub's.
        notices: what was noticed when they were looked for.
    """

    paths: WeightPaths
    digests: dict[str, str] | None
    commands: tuple[Command, ...]
    summary: str
    tokenizer: Path | None = None
    requests: tuple[Request, ...] = ()
    checked: bool = True
    local: tuple[LocalFile, ...] = ()
    notices: tuple[str, ...] = ()

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


# The options of each repository that a model's parts are in.
REPOSITORIES = {
    "repository": ("revision", ("transformer", "vae")),
    "encoders_repository": ("encoders_revision", ("text_encoder", "byt5", "image_encoder")),
}


def parts_of(task: str) -> tuple[str, ...]:
    """List the parts that a task needs: only i2v has an image encoder."""
    return tuple(part for part in PART_NAMES if task == "i2v" or part != "image_encoder")


def hub_requests(model: ModelConfig, task: str) -> tuple[Request, ...]:
    """List the files that a task needs from the hub, one request per repository."""
    requests = []
    for repository, (revision, parts) in REPOSITORIES.items():
        values = [getattr(model, part) for part in parts if part in parts_of(task)]
        if files := tuple(value for value in values if not is_local(value)):
            requests.append(
                Request(
                    getattr(model, repository),
                    getattr(model, revision),
                    files,
                    option=f"model.{revision}",
                )
            )
    return (*requests, *_tokenizers(model))


def _tokenizers(model: ModelConfig) -> tuple[Request, Request]:
    return (
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


def published_weights(config: RunConfig, root: Path, *, whole: bool) -> LocatedWeights:
    """Locate the weights of a published model, on the hub or in files on this computer; reads only.

    Args:
        config: the run's config, with absolute paths of local files.
        root: the output folder.
        whole: whether local files need the tensors that only musubi-tuner reads.

    Raises:
        UserError: a local file is damaged, or not this model's.
    """
    model, task = config.model, config.task.name
    hub_cache, hashes, requests = (
        user_hub_cache(root),
        Hashes(_notes(root)),
        hub_requests(model, task),
    )
    local: list[LocalFile] = []
    paths: dict[str, str] = dict.fromkeys(PART_NAMES, "")
    digests: dict[str, str | None] = {}
    for part, repository, revision in _places(model, task):
        value = getattr(model, part)
        if is_local(value):
            file = checked_file(part, Path(value), hashes, whole=whole)
            local.append(file)
            paths[part], digests[part] = value, file.sha256
            continue
        commit = hub_cache.commit(repository, revision)
        paths[part] = str(hub_cache.path(repository, commit or revision, value))
        digests[part] = _digest(hub_cache, repository, commit, value)
    for part, tokenizer in zip(("text_encoder", "byt5"), requests[-2:], strict=True):
        commit = hub_cache.commit(tokenizer.repository, tokenizer.revision)
        both = digests[part], _digest(hub_cache, tokenizer.repository, commit, *tokenizer.files)
        digests[part] = None if None in both else _joined(both)
    unchecked = sum(hub_cache.unchecked(request) for request in requests)
    complete = None not in digests.values() and all(hub_cache.pointed(r) for r in requests)
    force = "weights" in config.stages.force
    fetch = _command(requests, hub_cache, root, force=force)
    return LocatedWeights(
        WeightPaths(**paths),
        {part: value for part, value in digests.items() if value} if complete else None,
        # A fetch that cannot succeed fails at once, and hashing takes minutes.
        (fetch, *_hash_commands(local, root, force=force)),
        _summary(requests, hub_cache, unchecked, local),
        find_tokenizer(model, root),
        requests,
        checked=not unchecked,
        local=tuple(local),
    )


def _places(model: ModelConfig, task: str) -> Iterator[tuple[str, str, str]]:
    """Yield each part that a task needs, with the repository and revision for its files."""
    for repository, (revision, parts) in REPOSITORIES.items():
        for part in parts:
            if part in parts_of(task):
                yield part, getattr(model, repository), getattr(model, revision)


def _digest(hub_cache: HubCache, repository: str, commit: str | None, *files: str) -> str | None:
    """Return the digest of cached files, of several (a tokenizer's) a joint one; else None."""
    hub_files = [hub_cache.find(repository, commit, file) for file in files]
    parts = [None if one is None else hub_cache.name_of(one) for one in hub_files]
    if None in parts:
        return None
    return parts[0] if len(parts) == 1 else _joined(parts)


def _summary(
    requests: Sequence[Request], hub_cache: HubCache, unchecked: int, local: Sequence[LocalFile]
) -> str:
    number = counted(sum(len(request.files) for request in requests), "file")
    summary = f"{number} of {requests[0].repository}, its encoders and tokenizers"
    if local:
        names = ", ".join(PART_NAMES[file.part] for file in local)
        repositories = ", ".join(request.repository for request in requests)
        summary = f"{names} on this computer; {number} of {repositories}"
    missing = sum(len(hub_cache.missing_files(request)) for request in requests)
    unknown = sum(file.sha256 is None for file in local)
    for count, what in ((missing, "fetch"), (unchecked, "check"), (unknown, "hash")):
        summary += f", {count} to {what}" * (count > 0)
    return summary


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
    return HubCache.of_user(_notes(root))


def _notes(root: Path) -> Path:
    return root / "cache" / "weights" / "checked"


def _joined(parts: Iterable[str | None]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _command(
    requests: Iterable[Request], hub_cache: HubCache, root: Path, *, force: bool
) -> Command:
    """Build the one command for all requests, so that each is checked before any is fetched."""
    argv = ["runner.hub"]
    for number, request in enumerate(requests):
        commit = hub_cache.commit(request.repository, request.revision)
        argv += ["--and"] * (number > 0) + [request.repository]
        argv += ["--revision", commit or request.revision, "--named", request.option]
        for pattern in request.patterns:
            argv += ["--include", pattern]
        if request.branch is not None:
            argv += ["--branch", request.branch]
        if number == 0:
            argv += ["--checked", str(_notes(root))]
            argv += ["--force"] * force
        argv += ["--", *request.files]
    return _module(*argv)


def _hash_commands(files: Sequence[LocalFile], root: Path, *, force: bool) -> Iterator[Command]:
    if files:
        options = ["--checked", str(_notes(root)), *["--force"] * force, "--"]
        yield _module("runner.hub.local_files", *options, *(str(file.path) for file in files))


def _module(name: str, *arguments: str) -> Command:
    path = checkout()
    return Command(
        (sys.executable, "-m", name, *arguments), set_env=(("PYTHONPATH", path),) if path else ()
    )
