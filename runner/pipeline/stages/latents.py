"""The latents stage: put latents into the run's cache folder, encoding missing ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runner.core.command import Command
from runner.data.select import SelectedItem
from runner.engines.base import Engine, Job
from runner.formats import jsonl
from runner.formats.cache_arguments import changing
from runner.formats.cache_files import image_latents_name, video_latents_name
from runner.formats.dataset_toml import DatasetTable
from runner.formats.frames import Crop
from runner.formats.media_types import MediaKind
from runner.formats.trainer_options import LATENTS as LATENTS_SCRIPT
from runner.pipeline.model import CacheEntry, Inputs
from runner.pipeline.stages.encoding import Encoding, Encodings, add_link, cache_inputs_to_use
from runner.pipeline.stages.filling import WorkWords
from runner.pipeline.tables import narrows, run_cache_folder, table
from runner.storage.shared_cache import cache_key

# Increase when decoding or resizing changes, so that older latents are not reused.
DECODE_VERSION = 1


class Latents(Encoding):
    """The stage that encodes media with the VAE."""

    name = "latents"
    what = "latents"
    work = WorkWords("latent", "encodes")

    def command(self, engine: Engine, job: Job, dataset_toml: str) -> Command:
        """Return the engine's command that encodes latents; pure."""
        return engine.cache_latents(job, dataset_toml)

    def encodings(self, inputs: Inputs) -> Encodings:
        """List the latents of all items, one entry per picture or crop; pure."""
        force = self.name in inputs.config.stages.force
        wanted: dict[str, CacheEntry] = {}
        missing = 0
        # Items with the same source, media kind and missing lengths are encoded together.
        makers: dict[tuple[int, MediaKind, tuple[int, ...]], list[SelectedItem]] = {}
        for item in inputs.selection.items:
            absent: set[int] = set()
            for crop in item.crops or (None,):
                entry = _latents_entry(inputs, item, crop, force=force)
                if not add_link(wanted, entry):
                    continue
                if force or entry.full_key not in inputs.cached:
                    missing += 1
                    absent.add(crop.frames if crop else 1)
            if absent:
                key = (item.source, item.media_kind, tuple(sorted(absent)))
                makers.setdefault(key, []).append(item)
        tables: list[DatasetTable] = []
        files: list[tuple[str, str]] = []
        for number, ((source, media_kind, frames), items) in enumerate(sorted(makers.items())):
            folder = f"staging/latents-{number}"
            rows = [(f"dataset/media/{item.media_name}", item.caption) for item in items]
            files.append((f"{folder}.jsonl", jsonl.render(media_kind, rows)))
            dataset = table(inputs.sources[source], media_kind, "", items)
            extraction = dataset.extraction
            if extraction is not None and narrows(extraction):
                extraction = replace(extraction, target_frames=frames)
            tables.append(
                replace(
                    dataset,
                    jsonl=f"{folder}.jsonl",
                    cache_directory=folder,
                    batch_size=1,
                    num_repeats=1,
                    extraction=extraction,
                )
            )
        return Encodings(wanted, missing, files, tables)


def _latents_entry(
    inputs: Inputs, item: SelectedItem, crop: Crop | None, *, force: bool
) -> CacheEntry:
    """Return the cache entry of a picture, or of one crop of a clip."""
    digests = inputs.weights.digests or {}
    task = inputs.config.task.name
    extraction = inputs.sources[item.source].options.extraction
    cache_inputs: dict[str, Any] = {
        "media": item.media.sha256,
        "bucket": list(item.bucket),
        "frames": None if crop is None else [crop.position, crop.frames],
        # The positions count frames at this rate.
        "source_fps": None if crop is None else extraction.source_fps,
        "vae": digests.get("vae"),
        "vae_tile": inputs.memory.vae_tile or 0,
        "task": task,
        "image_encoder": digests.get("image_encoder") if task == "i2v" else None,
        "decode": DECODE_VERSION,
    }
    if item.correction.changes:
        cache_inputs["correction"] = item.correction.cache_inputs(copy=False)
    arguments = changing(LATENTS_SCRIPT, inputs.config.engine.cache_args)
    if arguments:
        cache_inputs["arguments"] = arguments
    # Tiling is an approximation, and with another tile another one, so entries of different tiles
    # stay apart; but an untiled entry is exact, and serves any tile.
    acceptable = [{**cache_inputs, "vae_tile": 0}, cache_inputs]
    cache_inputs = cache_inputs_to_use(inputs, "latents", acceptable, force=force)
    if crop is None:
        produced = image_latents_name(item.id, item.media.size)
    else:
        produced = video_latents_name(item.id, crop, item.bucket)
    link_path = f"{run_cache_folder(item)}/{produced}"
    return CacheEntry(produced, "latents", cache_key(cache_inputs), cache_inputs, (link_path,))


LATENTS = Latents()
