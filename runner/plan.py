"""RunConfig and facts in, Plan out; pure.

A plan holds everything a run does: ordered stages with their exact commands, the files they read
that the runner writes, what they make, and whether that is there already. A dry run prints the
very object that a real run executes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner import rules_musubi
from runner.commands import Command
from runner.config import MemoryConfig, RunConfig
from runner.engines.base import Engine, EngineFacts, Machine
from runner.errors import UserError
from runner.formats import jsonl, train_toml
from runner.formats.cache import image_latents_name, text_name, video_latents_name
from runner.formats.dataset_toml import DatasetEntry
from runner.formats.dataset_toml import render as render_dataset
from runner.formats.frames import FrameExtraction
from runner.formats.train_toml import WeightPaths
from runner.items import (
    Kind,
    SelectedItem,
    Selection,
    Source,
    counted,
    dataset_fingerprint,
)
from runner.rules import STAGES
from runner.store import key_of

# Raised when decoding or resizing changes, so that older latents are not taken for newer ones.
DECODE_VERSION = 1


@dataclass(frozen=True)
class WeightFacts:
    """Where the weights are or will be, and the digest of each once they are there."""

    paths: WeightPaths
    digests: dict[str, str] | None
    commands: tuple[Command, ...]
    summary: str

    @property
    def present(self) -> bool:
        return self.digests is not None


@dataclass(frozen=True)
class Facts:
    """What the disk, the card and the environment say; gathered by :mod:`runner.facts`."""

    root: Path
    python: str
    python_path: str | None
    sources: tuple[Source, ...]
    selection: Selection
    weights: WeightFacts
    cached: frozenset[str]
    memory: MemoryConfig
    memory_note: str | None
    machine: Machine | None
    engine: EngineFacts
    seed: int


@dataclass(frozen=True)
class Entry:
    """A cache entry: the file that the engine writes, its place in the store, and its links."""

    produced: str
    shelf: str
    name: str
    made_of: dict[str, Any]
    links: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One stage. ``files`` are written into the run's folder before ``commands`` are run."""

    name: str
    summary: str
    state: str
    commands: tuple[Command, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    entries: tuple[Entry, ...] = ()
    missing: int = 0
    outputs: tuple[str, ...] = ()

    @property
    def to_run(self) -> bool:
        return self.state == "to run"


@dataclass(frozen=True)
class Plan:
    """A run, before it happens."""

    name: str
    stages: tuple[Stage, ...]
    files: tuple[tuple[str, str], ...]
    steps: int
    steps_per_epoch: int
    epochs: int
    notices: tuple[str, ...]
    fingerprint: str

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError when the plan has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)


def default_name(config: RunConfig) -> str:
    """A run's name when none is given."""
    return f"{config.task.name}-{config.network.name}{config.network.rank}-{config.optimizer.name}"


def make_plan(config: RunConfig, facts: Facts, engine: Engine) -> Plan:
    """The plan of a run. The same arguments give an equal plan.

    Raises :class:`UserError` for options that the data make impossible.
    """
    compiled, compile_note = engine.compiles(config, facts.machine)
    per_epoch = steps_per_epoch(config, facts)
    total = config.training.max_steps or config.training.epochs * per_epoch
    clips = any(item.kind == "video" for item in facts.selection.items)
    eight_bit = config.optimizer.type.lower().endswith("8bit")
    if config.engine.name == "diffusers" and eight_bit and facts.machine is None:
        raise UserError(
            f"optimizer={config.optimizer.name} needs an NVIDIA card, and none was found: take "
            "optimizer=adamw."
        )
    notices = [*facts.selection.notices]
    if config.engine.name == "musubi":
        for problem in rules_musubi.plan_problems(config, steps=total, clips=clips):
            raise UserError(problem)
        notices += rules_musubi.plan_notices(config, steps=total)
    notices += [note for note in (facts.memory_note, compile_note) if note]
    if config.engine.name == "musubi" and "evaluate" not in config.stages.skip:
        notices.append("engine=musubi has no evaluate stage yet: there will be no eval/loss.")
    if config.network.name != "lora":
        notices.append(
            f"network={config.network.name} is not converted for ComfyUI: only LoRA can be."
        )
    options = train_toml.train_options(
        config, facts.weights.paths, facts.memory, seed=facts.seed, compile_blocks=compiled
    )
    files: list[tuple[str, str]] = [
        ("dataset.toml", render_dataset(entries(facts, held_out=False))),
        *engine.files(config).items(),
    ]
    if config.engine.arguments == "file":
        files.insert(1, ("train.toml", train_toml.render(options)))
    if facts.selection.has_held_out:
        files.append(("validation.toml", render_dataset(entries(facts, held_out=True))))
    if config.sampling.name == "prompts":
        files.append(
            ("sample_prompts.txt", train_toml.sample_prompts(config, config.sampling.image_path))
        )
    stages = [
        _weights(facts),
        _dataset(facts),
        _latents(config, facts, engine),
        _text(config, facts, engine),
        Stage(
            "train",
            counted(total, "step"),
            "to run",
            commands=(engine.train(config, options),),
            outputs=("checkpoints/lora.safetensors", "lora.safetensors"),
        ),
        *_convert(config, facts),
        *_evaluate(config, facts, engine),
    ]
    assert [stage.name for stage in stages] == [n for n in STAGES if n in {s.name for s in stages}]
    return Plan(
        name=config.name or default_name(config),
        stages=tuple(_with_wishes(config, stage) for stage in stages),
        files=tuple(files),
        steps=total,
        steps_per_epoch=per_epoch,
        epochs=math.ceil(total / per_epoch),
        notices=tuple(notices),
        fingerprint=dataset_fingerprint(facts.selection.items),
    )


def _with_wishes(config: RunConfig, stage: Stage) -> Stage:
    without_lora = "train" in config.stages.skip and stage.name in ("convert", "evaluate")
    if stage.name in config.stages.skip or without_lora:
        return replace(stage, state="skipped")
    if stage.name in config.stages.force and stage.state == "done":
        return replace(stage, state="to run")
    return stage


def steps_per_epoch(config: RunConfig, facts: Facts) -> int:
    """Optimizer steps in an epoch: batches of equal shape, over gradient accumulation."""
    batches = 0
    for index, source in enumerate(facts.sources):
        counts: dict[tuple[Any, ...], int] = {}
        for item in facts.selection.items:
            if item.source != index or item.held_out:
                continue
            for crop in item.crops or (None,):
                shape = (item.kind, item.bucket, crop.frames if crop else 1)
                counts[shape] = counts.get(shape, 0) + source.options.num_repeats
        batches += sum(math.ceil(count / source.options.batch_size) for count in counts.values())
    return max(1, math.ceil(batches / config.training.gradient_accumulation_steps))


def samples_per_epoch(facts: Facts) -> int:
    """Pictures and crops seen in an epoch, repeats included."""
    return sum(
        len(item.crops or (None,)) * facts.sources[item.source].options.num_repeats
        for item in facts.selection.items
        if not item.held_out
    )


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


def _weights(facts: Facts) -> Stage:
    return Stage(
        "weights",
        facts.weights.summary,
        "done" if facts.weights.present else "to run",
        commands=facts.weights.commands,
        outputs=(facts.weights.paths.transformer,),
    )


def media_entry(item: SelectedItem) -> str:
    """The name of an item's media in the store."""
    suffix = Path(item.media_name).suffix
    return item.media.sha256 + ("-rgb" if item.as_rgb else "") + suffix


def _dataset(facts: Facts) -> Stage:
    files: list[tuple[str, str]] = []
    for held_out in (False, True):
        for index, _source, kind, group in _groups(facts, held_out):
            rows = [(f"dataset/media/{item.media_name}", item.caption) for item in group]
            name = f"dataset/{_folder(index, kind, held_out)}.jsonl"
            files.append((name, jsonl.render(kind, rows)))
    items = facts.selection.items
    unpacked = [item for item in items if item.media.file is None or item.as_rgb]
    missing = {media_entry(item) for item in unpacked if _absent(facts, "media", media_entry(item))}
    pictures = sum(item.kind == "image" for item in items)
    summary = f"{counted(pictures, 'picture')}, {counted(len(items) - pictures, 'clip')}"
    if missing:
        summary += f", {len(missing)} to unpack"
    return Stage(
        "dataset",
        summary,
        "to run" if missing else "done",
        files=tuple(files),
        missing=len(missing),
        outputs=("dataset",),
    )


def _absent(facts: Facts, shelf: str, name: str) -> bool:
    return f"{shelf}/{name}" not in facts.cached


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


def _latents(config: RunConfig, facts: Facts, engine: Engine) -> Stage:
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
    return _cache_stage(
        "latents",
        wanted,
        missing,
        files,
        staging,
        lambda toml: engine.cache_latents(config, facts.weights.paths, facts.memory, toml),
    )


def _text(config: RunConfig, facts: Facts, engine: Engine) -> Stage:
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


def _convert(config: RunConfig, facts: Facts) -> list[Stage]:
    if config.network.name != "lora":
        return []
    command = Command(
        (
            *(facts.python, "-m", "runner.stages.convert"),
            *("lora.safetensors", "lora_comfyui.safetensors"),
        ),
        set_env=(("PYTHONPATH", facts.python_path),) if facts.python_path else (),
    )
    return [
        Stage(
            "convert",
            "lora_comfyui.safetensors",
            "to run",
            commands=(command,),
            outputs=("lora_comfyui.safetensors",),
        )
    ]


def _evaluate(config: RunConfig, facts: Facts, engine: Engine) -> list[Stage]:
    held_out = facts.selection.has_held_out
    command = engine.evaluate(config, "validation.toml" if held_out else "dataset.toml")
    if command is None:
        return []
    # Each crop of a clip has a loss of its own.
    number = sum(
        max(1, len(item.crops)) for item in facts.selection.items if item.held_out == held_out
    )
    which = "held-out" if held_out else "training"
    return [
        Stage(
            "evaluate",
            f"eval/loss on {counted(number, f'{which} item')}",
            "to run",
            commands=(command,),
            missing=number,
            outputs=("evaluation.json",),
        )
    ]


def commands_sh(plan: Plan, folder: str) -> str:
    """A script that runs the plan's commands by hand, in the run's folder."""
    lines = ["#!/bin/sh", f"# {plan.name}: what was run, in order.", "set -e"]
    lines.append('cd "$(dirname "$0")"')
    for stage in plan.stages:
        lines += ["", f"# {stage.name}: {stage.summary} ({stage.state})"]
        if not stage.to_run:
            continue
        lines += [command.shell() for command in stage.commands]
        if stage.name == "train":
            # The place may be a second name of the very file, which cp would refuse.
            lines.append("rm -f lora.safetensors")
            lines.append("cp checkpoints/lora.safetensors lora.safetensors")
    return "\n".join(lines) + "\n"


def config_fingerprint(resolved: dict[str, Any]) -> str:
    """A digest of what decides the result: name, tracking, paths and dry_run left out."""
    kept = {k: v for k, v in resolved.items() if k not in ("name", "tracking", "output_dir")}
    kept.pop("dry_run", None)
    return key_of(json.loads(json.dumps(kept, default=str)))[:16]
