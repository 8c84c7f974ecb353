"""The options of each source of a dataset, completed from ``dataset``; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runner.config.colours import hex_colour
from runner.config.dataset_schema import DatasetConfig, SourceConfig
from runner.formats.bucket import Size
from runner.formats.frames import FrameExtraction


@dataclass(frozen=True)
class SourceOptions:
    """The options of one source; those it does not set are taken from ``dataset``."""

    path: str
    source_kind: str
    revision: str
    trigger_word: str | None
    default_caption: str | None
    missing_captions: str
    resolution: Size
    batch_size: int
    num_repeats: int
    enable_bucket: bool
    bucket_no_upscale: bool
    extraction: FrameExtraction
    fps: str
    background: str
    regularisation: bool = False
    weight: float = 1.0
    encoding: str | None = None
    captions: str = "whole"


def source_options(dataset: DatasetConfig) -> list[SourceOptions]:
    """Return the options of ``dataset.path``, or of each of ``dataset.sources``."""
    kind = dataset.kind
    if kind == "sample" and dataset.path != "sample":
        # A path given to a recipe whose default is the sample (rehearsal) replaces the sample.
        kind = "auto"
    sources = list(dataset.sources) or [SourceConfig(path=dataset.path, kind=kind)]
    return [_merge(dataset, source) for source in sources]


def _merge(dataset: DatasetConfig, source: SourceConfig) -> SourceOptions:
    def pick(key: str) -> Any:
        own = getattr(source, key)
        return getattr(dataset, key) if own is None else own

    width, height = pick("resolution")
    return SourceOptions(
        path=source.path,
        source_kind=source.kind,
        revision=pick("revision"),
        # A regularisation set does not show the subject, so it inherits no trigger word.
        trigger_word=source.trigger_word if source.regularisation else pick("trigger_word"),
        default_caption=pick("default_caption"),
        missing_captions=dataset.missing_captions,
        resolution=(width, height),
        batch_size=pick("batch_size"),
        num_repeats=1 if source.regularisation else pick("num_repeats"),
        enable_bucket=pick("enable_bucket"),
        bucket_no_upscale=pick("bucket_no_upscale"),
        extraction=FrameExtraction(
            target_frames=tuple(sorted(set(pick("target_frames")))),
            mode=pick("frame_extraction"),
            stride=pick("frame_stride"),
            sample=pick("frame_sample"),
            max_frames=pick("max_frames"),
            source_fps=pick("source_fps"),
        ),
        fps=pick("fps"),
        background=hex_colour(dataset.background) or "#ffffff",
        regularisation=source.regularisation,
        weight=1.0 if source.weight is None else source.weight,
        encoding=pick("encoding"),
        captions=pick("captions"),
    )
