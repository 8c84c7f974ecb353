"""The text stage: put text embeddings into the run's cache folder, encoding missing ones."""

from __future__ import annotations

from typing import Any

from runner.core.command import Command
from runner.engines.base import Engine, Job
from runner.formats import jsonl
from runner.formats.cache_arguments import changing
from runner.formats.cache_files import text_name
from runner.formats.dataset_toml import DatasetTable
from runner.formats.trainer_options import TEXT as TEXT_SCRIPT
from runner.pipeline.model import CacheEntry, Inputs
from runner.pipeline.stages.encoding import Encoding, Encodings, add_link, cache_inputs_to_use
from runner.pipeline.stages.filling import WorkWords
from runner.pipeline.tables import run_cache_folder
from runner.storage.shared_cache import cache_key, json_digest


class Text(Encoding):
    """The stage that encodes captions."""

    name = "text"
    what = "encoded captions"
    work = WorkWords("caption", "encodes")

    def command(self, engine: Engine, job: Job, dataset_toml: str) -> Command:
        """Return the engine's command that encodes captions; pure."""
        return engine.cache_text(job, dataset_toml)

    def encodings(self, inputs: Inputs) -> Encodings:
        """List the text embeddings of all items, one entry per distinct caption; pure."""
        digests = inputs.weights.digests or {}
        force = self.name in inputs.config.stages.force
        arguments = changing(TEXT_SCRIPT, inputs.config.engine.cache_args)
        wanted: dict[str, CacheEntry] = {}
        for item in inputs.selection.items:
            asked: dict[str, Any] = {
                "caption": item.caption,
                "text_encoder": digests.get("text_encoder"),
                "byt5": digests.get("byt5"),
                # Weights rounded to fp8, which only musubi-tuner can load, are other weights: their
                # embeddings were not found to be as near to float32 as the others are, so they stay
                # apart, also between the runs of one engine.
                "fp8": bool(inputs.memory.fp8_text_encoder),
            }
            if arguments:
                asked["arguments"] = arguments
            cache_inputs = cache_inputs_to_use(inputs, "text", [asked], force=force)
            produced = text_name(json_digest(cache_inputs))
            link_path = f"{run_cache_folder(item)}/{text_name(item.id)}"
            add_link(
                wanted,
                CacheEntry(produced, "text", cache_key(cache_inputs), cache_inputs, (link_path,)),
            )
        missing = [e for e in wanted.values() if force or e.full_key not in inputs.cached]
        if not missing:
            return Encodings(wanted, 0, (), ())
        # Captions are encoded without their media, so one line per caption is enough.
        rows = [
            (entry.produced.removesuffix(text_name("")) + ".png", entry.cache_inputs["caption"])
            for entry in missing
        ]
        only = DatasetTable(
            kind="image",
            cache_directory="staging/text",
            resolution=(16, 16),
            jsonl="staging/text.jsonl",
        )
        files = [("staging/text.jsonl", jsonl.render("image", rows))]
        return Encodings(wanted, len(missing), files, [only])


TEXT = Text()
