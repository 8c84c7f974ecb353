"""The options of a dataset and of its sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from runner.config.option import Needs, option

# Kinds of source; auto detects the kind from the path.
SourceKind = Literal["archive", "zip", "folder", "jsonl", "hub", "sample"]
SOURCE_KINDS = ("auto", *get_args(SourceKind))
CAPTIONS = ("whole", "first", "all")
FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")


@dataclass
class SourceConfig:
    """One of several datasets; options that are not set are inherited from ``dataset``."""

    path: str = option("", "Zip, folder or JSONL file; owner/name with hub.", path=True)
    kind: str = option(
        "auto", "Kind of source; auto detects it from the path.", choices=SOURCE_KINDS
    )
    revision: str | None = None
    trigger_word: str | None = None
    default_caption: str | None = None
    encoding: str | None = None
    captions: str | None = option(
        None, "What becomes of several captions, as in dataset.", choices=CAPTIONS
    )
    resolution: list[int] | None = None
    batch_size: int | None = None
    num_repeats: int | None = None
    target_frames: list[int] | None = None
    frame_extraction: str | None = None
    frame_stride: int | None = None
    frame_sample: int | None = None
    max_frames: int | None = None
    source_fps: float | None = None
    fps: str | None = None
    enable_bucket: bool | None = None
    bucket_no_upscale: bool | None = None
    regularisation: bool = option(
        False,
        "Regularisation set: media of the subject's class but not of the subject, so that the "
        "model does not forget the class. They get no trigger word from dataset, are never held "
        "out, and weight sets how often they are seen.",
    )
    weight: float | None = option(
        None,
        "Ratio of regularisation samples to all other samples in an epoch (default 1). The set is "
        "repeated, or a part of it is taken, to come as close to this as possible.",
        above=0,
    )


@dataclass
class DatasetConfig:
    kind: str = option(
        "auto",
        "Kind of source; auto detects it from the path, hub is a dataset of the Hugging Face hub.",
        choices=SOURCE_KINDS,
    )
    path: str = option(
        "data", "Zip, folder or JSONL file of pictures and clips; owner/name with hub.", path=True
    )
    revision: str = option(
        "main",
        "Branch, tag or commit of a dataset of the hub. A branch is resolved once; "
        "stages.force=[dataset] resolves it again.",
    )
    trigger_word: str | None = option(
        None, "Word put before every caption that does not contain it."
    )
    default_caption: str | None = option(None, "Caption for media without one.")
    missing_captions: str = option(
        "error", "What to do about media without a caption.", choices=("error", "skip")
    )
    encoding: str | None = option(
        None,
        "Encoding of captions and lists that are not UTF-8 and have no mark, such as cp1252, cp932 "
        "or koi8-r. null decides it from all of them, and shows it.",
    )
    captions: str = option(
        "whole",
        "What becomes of a caption of several lines, and of a list of captions: whole (all lines "
        "are one caption, of a list the first is taken), first, or all (each makes an item).",
        choices=CAPTIONS,
    )
    resolution: list[int] = option(
        [544, 960], "Width and height in pixels; buckets have about the same area."
    )
    batch_size: int = option(1, "Items per batch.", at_least=1)
    num_repeats: int = option(1, "How often each item is seen per epoch.", at_least=1)
    target_frames: list[int] = option(
        [1, 13, 25], "Lengths of the crops cut from clips, in frames, each of the form 4N+1."
    )
    frame_extraction: str = option(
        "head", "How crops are placed in a clip.", choices=FRAME_EXTRACTIONS
    )
    frame_stride: int = option(
        1,
        "Frames between the starts of crops (frame_extraction=slide).",
        at_least=1,
        needs=Needs("dataset.frame_extraction", ("slide",)),
    )
    frame_sample: int = option(
        1,
        "Crops per clip and length (frame_extraction=uniform).",
        at_least=1,
        needs=Needs("dataset.frame_extraction", ("uniform",)),
    )
    max_frames: int = option(
        129,
        "Maximum length of a crop in frames (frame_extraction=full).",
        at_least=1,
        needs=Needs("dataset.frame_extraction", ("full",)),
    )
    fps: str = option(
        "auto",
        "Frames per second that faster clips are brought to by their own rate: auto is the "
        "model's 24, a number another, native keeps every frame. Slower clips keep all of theirs.",
    )
    source_fps: float | None = option(
        None,
        "Frame rate of all clips, instead of their own: frames are dropped to reach 24 per second.",
        above=0,
    )
    background: str = option(
        "white", "Colour behind transparent pixels: white, black, gray, or '#rrggbb' in quotes."
    )
    enable_bucket: bool = option(True, "Keep aspect ratios by sorting into buckets.")
    bucket_no_upscale: bool = option(False, "Never enlarge a picture to its bucket.")
    validation_fraction: float = option(
        0.0, "Fraction of the items held out for eval/loss.", at_least=0, below=1
    )
    max_archive_gb: float = option(
        100.0,
        "Refuse an archive that unpacks to more than this many GB.",
        above=0,
        digests="neither",
    )
    sources: list[SourceConfig] = field(
        default_factory=list,
        metadata={
            "help": "Several datasets in one run, instead of dataset.path, each with its own "
            "options: [{path: a.zip, num_repeats: 2}, {path: reg, regularisation: true, "
            "weight: 0.5}].",
            "choices": (),
        },
    )
