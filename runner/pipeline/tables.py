"""The datasets of a run as dataset.toml has them: one for each source, kind and side; pure."""

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
    """The items of each source and kind on one side of the split, where there are any."""
    for index, source in enumerate(inputs.sources):
        kinds: tuple[MediaKind, ...] = ("image", "video")
        for kind in kinds:
            items = inputs.selection.of(index, kind, held_out=held_out)
            if items:
                yield index, source, kind, items


def folder(source: int, kind: MediaKind, held_out: bool) -> str:
    """The name of one group's folder and files in the run's folder."""
    return f"{source}-{kind}s{'-held-out' if held_out else ''}"


def run_cache_folder(item: SelectedItem) -> str:
    """The folder of the run that an item's cache files are linked into."""
    return f"cache/{folder(item.source, item.media_kind, item.held_out)}"


def tables(inputs: Inputs, *, held_out: bool) -> list[DatasetTable]:
    """The datasets of dataset.toml (or validation.toml)."""
    return [
        table(source, kind, folder(index, kind, held_out), items)
        for index, source, kind, items in groups(inputs, held_out=held_out)
    ]


def table(
    source: Source, kind: MediaKind, name: str, items: Sequence[SelectedItem]
) -> DatasetTable:
    """The dataset of one group; of a clip's targets only those that some item reaches."""
    options = source.options
    extraction = None
    if kind == "video":
        targets = {crop.frames for item in items for crop in item.crops}
        extraction = options.extraction
        if narrows(extraction):
            kept = tuple(f for f in extraction.target_frames if f in targets)
            extraction = replace(extraction, target_frames=kept)
    return DatasetTable(
        kind=kind,
        cache_directory=f"cache/{name}",
        resolution=options.resolution,
        jsonl=f"dataset/{name}.jsonl",
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
