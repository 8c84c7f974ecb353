"""The stages that prepare data: which media, latents and texts a run wants, and which are missing.

Pure. Work is named by what goes into it, so that what another run made is found, whatever its
files are called, and nothing that was made of something else is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.text import counted, named
from runner.data.select import Kind, SelectedItem, Source
from runner.engines.base import Engine
from runner.formats import jsonl
from runner.formats.cache import image_latents_name, text_name, video_latents_name
from runner.formats.dataset_toml import DatasetEntry
from runner.formats.dataset_toml import render as render_dataset
from runner.formats.frames import FrameExtraction
from runner.pipeline.model import Entry, Facts, Stage
from runner.storage.store import key_of

# Raised when decoding or resizing changes, so that older latents are not taken for newer ones.
DECODE_VERSION = 1


def _groups(facts: Facts, held_out: bool) -> Iterable[tuple[int, Source, Kind, list[SelectedItem]]]:
    for index, source in enumerate(facts.sources):
        kinds: tuple[Kind, ...] = ("image", "video")
        for kind in kinds:
            items = facts.selection.of(index, kind, held_out=held_out)
            if items:
                yield index, source, kind, items


def _folder(index: int, kind: Kind, held_out: bool) -> str:
    return f"{index}-{kind}s{'-held-out' if held_out else ''}"


def entries(facts: Facts, *, held_out: bool) -> list[DatasetEntry]:
    """The datasets of dataset.toml (or validation.toml), one for each source and kind."""
    return [
        _entry(source, kind, _folder(index, kind, held_out), items)
        for index, source, kind, items in _groups(facts, held_out)
    ]


def _entry(source: Source, kind: Kind, folder: str, items: Sequence[SelectedItem]) -> DatasetEntry:
    options = source.options
    extraction = None
    if kind == "video":
        targets = {crop.frames for item in items for crop in item.crops}
        extraction = options.extraction
        if narrows(extraction):
            kept = tuple(f for f in extraction.target_frames if f in targets)
            extraction = replace(extraction, target_frames=kept)
    return DatasetEntry(
        kind=kind,
        cache_directory=f"cache/{folder}",
        resolution=options.resolution,
        jsonl=f"dataset/{folder}.jsonl",
        batch_size=options.batch_size,
        num_repeats=options.num_repeats,
        # musubi-tuner caches clips as if these were so, and then trains by the file: told
        # otherwise it would put clips of different shapes into one batch.
        enable_bucket=options.enable_bucket or kind == "video",
        bucket_no_upscale=options.bucket_no_upscale and kind == "image",
        extraction=extraction,
    )


def narrows(extraction: FrameExtraction) -> bool:
    """Whether leaving targets out leaves the crops of the others as they are.

    With ``source_fps`` the trainer reads a clip as far as its longest target says, and ``full``
    has no targets.
    """
    return extraction.mode != "full" and extraction.source_fps is None


def dataset_stage(config: RunConfig, facts: Facts) -> Stage:
    force = "dataset" in config.stages.force
    files: list[tuple[str, str]] = []
    for held_out in (False, True):
        for index, _source, kind, group in _groups(facts, held_out):
            rows = [(f"dataset/media/{item.media_name}", item.caption) for item in group]
            name = f"dataset/{_folder(index, kind, held_out)}.jsonl"
            files.append((name, jsonl.render(kind, rows)))
    items = facts.selection.items
    wanted: dict[str, Entry] = {}
    for item in items:
        if item.media.file is not None and not item.as_rgb:
            continue
        name, place = item.media.entry, f"dataset/media/{item.media_name}"
        known = wanted.get(name)
        if known is not None:
            wanted[name] = replace(known, links=(*known.links, place))
        else:
            wanted[name] = Entry(name, "media", name, item.media.made_of, (place,))
    missing = [name for name in wanted if force or _absent(facts, "media", name)]
    pictures = sum(item.kind == "image" for item in items)
    summary = f"{counted(pictures, 'picture')}, {counted(len(items) - pictures, 'clip')}"
    if missing:
        summary += f", {len(missing)} to unpack"
    return Stage(
        "dataset",
        summary,
        "to run" if missing else "done",
        files=tuple(files),
        entries=tuple(wanted.values()),
        missing=len(missing),
        outputs=("dataset",),
    )


def part_of(
    config: RunConfig, facts: Facts, engine: Engine, stage: Stage, todo: Collection[str]
) -> Stage:
    """The stage that encodes just these (``shelf/name``) of ``stage``'s entries.

    The others are there, or another process makes them.
    """
    rest = frozenset(entry.stored for entry in stage.entries) - frozenset(todo)
    config = replace(config, stages=replace(config.stages, force=[]))
    made = latents_stage if stage.name == "latents" else text_stage
    return made(config, replace(facts, cached=rest), engine)


def _absent(facts: Facts, shelf: str, name: str) -> bool:
    return f"{shelf}/{name}" not in facts.cached


# Entries of the two engines are kept apart ("engine" in what they are made of). Their networks are
# two implementations, and no weights fit both: musubi-tuner takes the published ones, the embedded
# engine its own tiny model. So nothing can show yet that their numbers are the same. The files
# have one format, and each engine's trainer reads the other's: docs/musubi-proof.md.


def entry_name(made_of: dict[str, Any]) -> str:
    """The name in the store of a cache entry made of this."""
    return key_of(made_of) + ".safetensors"


def latents_of(config: RunConfig, facts: Facts, item: SelectedItem) -> list[Entry]:
    """The latent cache entries of one item, one for a picture, one a crop for a clip."""
    digests = facts.weights.digests or {}
    force = "latents" in config.stages.force
    i2v = config.task.name == "i2v"
    folder = f"cache/{_folder(item.source, item.kind, item.held_out)}"
    made: list[Entry] = []
    extraction = facts.sources[item.source].options.extraction
    for crop in item.crops or (None,):
        made_of: dict[str, Any] = {
            "media": item.media.sha256,
            "bucket": list(item.bucket),
            "frames": None if crop is None else [crop.position, crop.frames],
            # Which decoded frames those are depends on the frame rates alone.
            "source_fps": None if crop is None else extraction.source_fps,
            "vae": digests.get("vae"),
            "vae_tile": facts.memory.vae_tile or 0,
            "engine": config.engine.name,
            "task": config.task.name,
            "image_encoder": digests.get("image_encoder") if i2v else None,
            "decode": DECODE_VERSION,
        }
        untiled = {**made_of, "vae_tile": 0}
        if not force and not _absent(facts, "latents", entry_name(untiled)):
            # Tiles save memory and approximate the whole frame, so that what is there is better.
            made_of = untiled
        if crop is None:
            produced = image_latents_name(item.id, item.media.size)
        else:
            produced = video_latents_name(item.id, crop, item.bucket)
        made.append(
            Entry(
                produced,
                "latents",
                entry_name(made_of),
                made_of,
                (f"{folder}/{produced}",),
            )
        )
    return made


def latents_stage(config: RunConfig, facts: Facts, engine: Engine) -> Stage:
    force = "latents" in config.stages.force
    wanted: dict[str, Entry] = {}
    makers: dict[tuple[int, Kind, tuple[int, ...]], list[SelectedItem]] = {}
    for item in facts.selection.items:
        lacking: list[int] = []
        for entry, crop in zip(latents_of(config, facts, item), item.crops or (None,), strict=True):
            known = wanted.get(entry.name)
            if known is not None:
                wanted[entry.name] = replace(known, links=known.links + entry.links)
                continue
            wanted[entry.name] = entry
            if force or _absent(facts, "latents", entry.name):
                lacking.append(crop.frames if crop else 1)
        if lacking:
            key = (item.source, item.kind, tuple(sorted(set(lacking))))
            makers.setdefault(key, []).append(item)
    staging: list[DatasetEntry] = []
    files: list[tuple[str, str]] = []
    for number, ((index, kind, frames), items) in enumerate(sorted(makers.items())):
        name = f"staging/latents-{number}.jsonl"
        rows = [(f"dataset/media/{item.media_name}", item.caption) for item in items]
        files.append((name, jsonl.render(kind, rows)))
        entry_ = _entry(facts.sources[index], kind, "", items)
        extraction = entry_.extraction
        if extraction is not None and narrows(extraction):
            extraction = replace(extraction, target_frames=frames)
        staging.append(
            replace(
                entry_,
                jsonl=name,
                cache_directory=f"staging/latents-{number}",
                batch_size=1,
                num_repeats=1,
                extraction=extraction,
            )
        )
    missing = sum(force or _absent(facts, "latents", name) for name in wanted)
    _refuse_gaps(config, facts, engine, "latents", wanted.values())
    return _cache_stage(
        "latents",
        wanted,
        missing,
        files,
        staging,
        lambda toml: engine.cache_latents(config, facts.weights.paths, facts.memory, toml),
    )


def text_stage(config: RunConfig, facts: Facts, engine: Engine) -> Stage:
    digests = facts.weights.digests or {}
    force = "text" in config.stages.force
    wanted: dict[str, Entry] = {}
    for item in facts.selection.items:
        made_of = {
            "caption": item.caption,
            "text_encoder": digests.get("text_encoder"),
            "byt5": digests.get("byt5"),
            "fp8": bool(facts.memory.fp8_text_encoder),
            "engine": config.engine.name,
        }
        key = key_of(made_of)
        folder = f"cache/{_folder(item.source, item.kind, item.held_out)}"
        place = f"{folder}/{text_name(item.id)}"
        name = entry_name(made_of)
        known = wanted.get(name)
        if known is not None:
            wanted[name] = replace(known, links=(*known.links, place))
        else:
            wanted[name] = Entry(text_name(key), "text", name, made_of, (place,))
    lacking = [e for e in wanted.values() if force or _absent(facts, "text", e.name)]
    _refuse_gaps(config, facts, engine, "text", wanted.values())
    files: list[tuple[str, str]] = []
    staging: list[DatasetEntry] = []
    if lacking:
        # Captions are encoded without their media, so one line for each caption is enough.
        rows = [
            (e.produced.removesuffix(text_name("")) + ".png", e.made_of["caption"]) for e in lacking
        ]
        files.append(("staging/text.jsonl", jsonl.render("image", rows)))
        staging.append(
            DatasetEntry(
                kind="image",
                cache_directory="staging/text",
                resolution=(16, 16),
                jsonl="staging/text.jsonl",
            )
        )
    return _cache_stage(
        "text",
        wanted,
        len(lacking),
        files,
        staging,
        lambda toml: engine.cache_text(config, facts.weights.paths, facts.memory, toml),
    )


def _refuse_gaps(
    config: RunConfig, facts: Facts, engine: Engine, name: str, wanted: Iterable[Entry]
) -> None:
    """Raise :class:`UserError` when a skipped stage lacks what the training wants.

    The trainer passes over items without a cache file and says nothing.
    """
    if name not in config.stages.skip or "train" in config.stages.skip or not facts.weights.present:
        # Without the weights nobody can tell what the entries are called; they are looked at
        # again once the weights are there.
        return
    absent = [entry for entry in wanted if _absent(facts, entry.shelf, entry.name)]
    ids = {PurePosixPath(p).name.partition("_")[0] for entry in absent for p in entry.links}
    evaluated = (
        "evaluate" not in config.stages.skip and engine.evaluate(config, "dataset.toml") is not None
    )
    items = [item for item in facts.selection.items if evaluated or not item.held_out]
    gaps = [item.media.name for item in items if item.id in ids]
    if gaps:
        what = "latents" if name == "latents" else "encoded captions"
        raise UserError(
            f"stages.skip=[{name}], but the {what} of {len(gaps)} of {counted(len(items), 'item')} "
            f"are not in the cache, or damaged there: {named(gaps)}. They would not be trained "
            f"on: take {name} out of stages.skip, what is cached is not encoded again."
        )


def _cache_stage(
    name: str,
    wanted: dict[str, Entry],
    missing: int,
    files: list[tuple[str, str]],
    staging: list[DatasetEntry],
    command: Any,
) -> Stage:
    toml = f"staging/{name}.toml"
    if missing:
        files.append((toml, render_dataset(staging)))
    what = "latent" if name == "latents" else "caption"
    kept = len(wanted) - missing
    summary = f"{counted(missing, what)} to encode" if missing else counted(len(wanted), what)
    if missing and kept:
        summary += f", {kept} cached"
    return Stage(
        name,
        summary,
        "to run" if missing else "done",
        commands=(command(toml),) if missing else (),
        files=tuple(files),
        entries=tuple(wanted.values()),
        missing=missing,
        outputs=("cache",),
    )
