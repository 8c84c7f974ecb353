"""The tables of dataset.toml, whose options are those of all their items; pure.

There is one for each source, media kind, side of the validation split, and number of repeats that
folders' names give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from runner.data.select import SelectedItem, Source
from runner.formats.dataset_toml import DatasetTable
from runner.formats.frames import FrameExtraction
from runner.formats.media_types import MediaKind
from runner.pipeline.model import Inputs


@dataclass(frozen=True)
class Group:
    """The items of one table, and the name of its folder and files in the run's folder."""

    name: str
    source: Source
    media_kind: MediaKind
    items: Sequence[SelectedItem]


def groups(inputs: Inputs, *, held_out: bool) -> Iterator[Group]:
    """Yield the groups of items on one side of the split, those of a source one after another."""
    for index, source in enumerate(inputs.sources):
        media_kinds: tuple[MediaKind, ...] = ("image", "video")
        for media_kind in media_kinds:
            items = inputs.selection.of(index, media_kind, held_out=held_out)
            for repeats in sorted({item.repeats for item in items}):
                of_group = [item for item in items if item.repeats == repeats]
                yield Group(_folder(of_group[0]), source, media_kind, of_group)


def _folder(item: SelectedItem) -> str:
    repeats = f"-x{item.repeats}" if item.repeats > 1 else ""
    side = "-held-out" if item.held_out else ""
    return f"{item.source}-{item.media_kind}s{repeats}{side}"


def run_cache_folder(item: SelectedItem) -> str:
    """Return the folder of the run that an item's cache files are linked into."""
    return f"cache/{_folder(item)}"


def tables(inputs: Inputs, *, held_out: bool) -> list[DatasetTable]:
    """Return the tables of dataset.toml (or validation.toml)."""
    return [
        table(group.source, group.media_kind, group.name, group.items)
        for group in groups(inputs, held_out=held_out)
    ]


def table(
    source: Source, media_kind: MediaKind, name: str, items: Sequence[SelectedItem]
) -> DatasetTable:
    """Return the table of one group, with only the target lengths that some item reaches."""
    options = source.options
    extraction = None
    if media_kind == "video":
        targets = {crop.frames for item in items for crop in item.crops}
        extraction = options.extraction
        if narrows(extraction):
            kept = tuple(f for f in extraction.target_frames if f in targets)
            extraction = replace(extraction, target_frames=kept)
    return DatasetTable(
        kind=media_kind,
        cache_directory=f"cache/{name}",
        resolution=options.resolution,
        jsonl=f"dataset/{name}.jsonl",
        batch_size=options.batch_size,
        num_repeats=options.num_repeats * items[0].repeats,
        # musubi-tuner caches clips as if these values were set, but batches by the file's values;
        # with others, clips of different sizes would share a batch.
        enable_bucket=options.enable_bucket or media_kind == "video",
        bucket_no_upscale=options.bucket_no_upscale and media_kind == "image",
        extraction=extraction,
    )


def narrows(extraction: FrameExtraction) -> bool:
    """Return whether target lengths can be dropped without changing the crops of the others.

    With ``source_fps`` the trainer reads a clip only as far as its longest target needs, and
    ``full`` has no targets.
    """
    return extraction.mode != "full" and extraction.source_fps is None
