"""The text stage: every item's text embeddings in the run's cache folder, encoded or found."""

from __future__ import annotations

from runner.core.command import Command
from runner.engines.base import Engine, Job
from runner.formats import jsonl
from runner.formats.cache import text_name
from runner.formats.dataset_toml import DatasetEntry
from runner.pipeline.model import Entry, Inputs
from runner.pipeline.stages.encoding import Encoding, Encodings, add_link
from runner.pipeline.stages.filling import Work
from runner.pipeline.tables import cache_folder
from runner.storage.store import entry_name, key_of


class Text(Encoding):
    name = "text"
    what = "encoded captions"
    work = Work("caption", "encodes")

    def command(self, engine: Engine, job: Job, dataset_toml: str) -> Command:
        return engine.cache_text(job, dataset_toml)

    def encodings(self, inputs: Inputs) -> Encodings:
        digests = inputs.weights.digests or {}
        force = self.name in inputs.config.stages.force
        wanted: dict[str, Entry] = {}
        for item in inputs.selection.items:
            made_of = {
                "caption": item.caption,
                "text_encoder": digests.get("text_encoder"),
                "byt5": digests.get("byt5"),
                "fp8": bool(inputs.memory.fp8_text_encoder),
                "engine": inputs.cache_identity,
            }
            produced = text_name(key_of(made_of))
            place = f"{cache_folder(item)}/{text_name(item.id)}"
            add_link(wanted, Entry(produced, "text", entry_name(made_of), made_of, (place,)))
        missing = [e for e in wanted.values() if force or e.stored not in inputs.cached]
        if not missing:
            return Encodings(wanted, 0, (), ())
        # Captions are encoded without their media, so one line for each caption is enough.
        rows = [
            (entry.produced.removesuffix(text_name("")) + ".png", entry.made_of["caption"])
            for entry in missing
        ]
        only = DatasetEntry(
            kind="image",
            cache_directory="staging/text",
            resolution=(16, 16),
            jsonl="staging/text.jsonl",
        )
        files = [("staging/text.jsonl", jsonl.render("image", rows))]
        return Encodings(wanted, len(missing), files, [only])


TEXT = Text()
