"""The tables of dataset.toml: one per source, media kind and side of the validation split; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from runner.data.select import SelectedItem, Source
from runner.formats.dataset_toml import DatasetTable
from runner.formats.frames import FrameExtraction
from runner.formats.media_types import MediaKind
from runner.pipeline.model import Inputs


def groups(
    inputs: Inputs, *, held_out: bool
) -> Iterable[tuple[int, Source, MediaKind, list[SelectedItem]]]:
    """Yield the items of each source and media kind on one side of the split, if there are any."""
    for index, source in enumerate(inputs.sources):
        media_kinds: tuple[MediaKind, ...] = ("image", "video")
        for media_kind in media_kinds:
            items = inputs.selection.of(index, media_kind, held_out=held_out)
            if items:
                yield index, source, media_kind, items


def folder(source: int, media_kind: MediaKind, held_out: bool) -> str:
    """Return the name of a group's folder and files in the run's folder."""
    return f"{source}-{media_kind}s{'-held-out' if held_out else ''}"


def run_cache_folder(item: SelectedItem) -> str:
    """Return the folder of the run that an item's cache files are linked into."""
    return f"cache/{folder(item.source, item.media_kind, item.held_out)}"


def tables(inputs: Inputs, *, held_out: bool) -> list[DatasetTable]:
    """Return the tables of dataset.toml (or validation.toml)."""
    return [
        table(source, media_kind, folder(index, media_kind, held_out), items)
        for index, source, media_kind, items in groups(inputs, held_out=held_out)
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
        num_repeats=options.num_repeats,
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
