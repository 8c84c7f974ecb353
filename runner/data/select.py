"""From what the sources hold to the items a run trains on; pure.

Here is decided which media are used and why others are not, each item's bucket and crops, its
caption as the encoder sees it, its names in the run's folder, and which side of the validation
split it is on.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from runner.config.schema import DatasetConfig, SourceConfig
from runner.core.errors import UserError
from runner.core.text import counted, named
from runner.formats.bucket import Size, bucket_size
from runner.formats.captions import with_trigger
from runner.formats.frames import Crop, FrameExtraction, crops, kept_frames

if TYPE_CHECKING:
    from runner.data.sources import SourceMedia
    from runner.data.sources.listing import ListedMedia

MediaKind = Literal["image", "video"]


@dataclass(frozen=True)
class SourceOptions:
    """The options of one source, with what it leaves out taken from ``dataset``."""

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
    regularisation: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Source:
    """One source: its options and what a scan of it found.

    ``commit`` is that of a hub's, ``unpacked`` the media that this run took out of its archive.
    """

    options: SourceOptions
    source_kind: str
    path: str
    items: tuple[SourceMedia, ...]
    ignored: tuple[tuple[str, str], ...]
    commit: str | None = None
    unpacked: int = field(default=0, compare=False)


@dataclass(frozen=True)
class SelectedItem:
    """One item of the run. ``crops`` is empty for a picture."""

    id: str
    source: int
    media_kind: MediaKind
    media: SourceMedia
    caption: str
    bucket: Size
    crops: tuple[Crop, ...]
    held_out: bool

    @property
    def as_rgb(self) -> bool:
        """Whether the run gets an RGB copy instead of the file itself."""
        return self.media.as_rgb

    @property
    def media_name(self) -> str:
        """The item's file in the run's ``dataset/media``; its stem is the item key."""
        suffix = ".png" if self.as_rgb else PurePosixPath(self.media.name).suffix.lower()
        return self.id + suffix


@dataclass(frozen=True)
class Selection:
    """The items of a run, and one line for everything left out or worth knowing."""

    items: tuple[SelectedItem, ...]
    notices: tuple[str, ...]

    def of(self, source: int, kind: MediaKind, *, held_out: bool) -> list[SelectedItem]:
        """The items of one source and kind on one side of the split, in order."""
        return [
            item
            for item in self.items
            if (item.source, item.media_kind, item.held_out) == (source, kind, held_out)
        ]

    @property
    def has_held_out(self) -> bool:
        return any(item.held_out for item in self.items)


@dataclass(frozen=True, order=True)
class Shape:
    """What the samples of a batch have in common; a picture has 1 frame."""

    source: int
    media_kind: MediaKind
    bucket: Size
    frames: int


def shapes(sources: Sequence[Source], selection: Selection) -> dict[Shape, int]:
    """How many samples of each shape an epoch trains on, repeats included, in order."""
    counts: dict[Shape, int] = {}
    for item in selection.items:
        if item.held_out:
            continue
        repeats = sources[item.source].options.num_repeats
        for crop in item.crops or (None,):
            shape = Shape(item.source, item.media_kind, item.bucket, crop.frames if crop else 1)
            counts[shape] = counts.get(shape, 0) + repeats
    return dict(sorted(counts.items()))


def source_options(dataset: DatasetConfig) -> list[SourceOptions]:
    """One entry for ``dataset.path``, or one for each of ``dataset.sources``."""
    kind = dataset.kind
    if kind == "sample" and dataset.path != "sample":
        # A path given to a recipe that takes the sample, as the rehearsal does, is meant.
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
        # The word stands for what is learned, which a regularisation set does not show.
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
        regularisation=source.regularisation,
        weight=1.0 if source.weight is None else source.weight,
    )


def select(sources: Sequence[Source], *, task: str, validation_fraction: float) -> Selection:
    """Choose the items of a run.

    Raises :class:`UserError` when media lack captions and nothing says what to do about them,
    when i2v has pictures alone, or when nothing is left to train on.
    """
    chosen: list[SelectedItem] = []
    notices: list[str] = []
    for index, source in enumerate(sources):
        notices += _unreadable(source)
        _refuse_missing_captions(source)
        left = _without_missing_captions(source, notices)
        if task == "i2v":
            left = _clips_only(left, notices)
        chosen += _place(index, source, left, task, validation_fraction, notices)
    if not chosen:
        raise UserError(_nothing_left(sources, task, notices))
    ordinary = [item for item in chosen if not sources[item.source].options.regularisation]
    notices += _about_the_split(ordinary, validation_fraction)
    return Selection(tuple(sorted(chosen, key=lambda item: (item.source, item.id))), tuple(notices))


def _nothing_left(sources: Sequence[Source], task: str, notices: Sequence[str]) -> str:
    """Why there is nothing to train on."""
    where = ", ".join(source.path for source in sources)
    found = [item.media_kind for source in sources for item in source.items]
    if task == "i2v" and found and "video" not in found:
        have = "has" if len(sources) == 1 else "have"
        return (
            f"task=i2v learns motion from clips, and {where} {have} pictures alone "
            f"({len(found)}): add clips, or take task=t2v."
        )
    why = f" {' '.join(notices)}" if notices else ""
    return f"Nothing to train on in {where}.{why}"


def _about_the_split(ordinary: Sequence[SelectedItem], fraction: float) -> Iterator[str]:
    """What is to be said of the split; UserError where it leaves nothing to train on."""
    held_out = sum(item.held_out for item in ordinary)
    if ordinary and held_out == len(ordinary):
        raise UserError(
            f"dataset.validation_fraction={fraction:g} holds out all {len(ordinary)} items: "
            "lower it."
        )
    if fraction and ordinary and not held_out:
        yield (
            f"dataset.validation_fraction={fraction:g} holds out none of the {len(ordinary)} "
            "items, which is chance with few: raise it."
        )


def _unreadable(source: Source) -> Iterator[str]:
    for name, why in source.ignored:
        yield f"{name} is left out: {why}."


def _has_no_caption(source: Source, item: SourceMedia) -> bool:
    return not item.caption and source.options.default_caption is None


def _refuse_missing_captions(source: Source) -> None:
    missing = [item.name for item in source.items if _has_no_caption(source, item)]
    if missing and source.options.missing_captions == "error":
        raise UserError(
            f"{len(missing)} of {len(source.items)} media in {source.path} have no caption: "
            f"{named(missing)}. Put a .txt of the same name beside each, or set "
            "dataset.default_caption='...' to caption them all, or "
            "dataset.missing_captions=skip to leave them out."
        )


def _without_missing_captions(source: Source, notices: list[str]) -> list[SourceMedia]:
    missing = [item.name for item in source.items if _has_no_caption(source, item)]
    if missing:
        notices.append(f"{len(missing)} media without a caption are left out: {named(missing)}.")
    return [item for item in source.items if not _has_no_caption(source, item)]


def _clips_only(items: list[SourceMedia], notices: list[str]) -> list[SourceMedia]:
    pictures = [item.name for item in items if item.media_kind == "image"]
    if pictures:
        notices.append(
            f"task=i2v learns from clips: {counted(len(pictures), 'picture')} left out: "
            f"{named(pictures)}."
        )
    return [item for item in items if item.media_kind == "video"]


def would_be_selected(item: SourceMedia, options: SourceOptions, task: str) -> bool:
    """Whether :func:`select` would take the item, so far as it alone can tell."""
    if not item.caption and options.default_caption is None:
        return False
    if item.media_kind == "image":
        return task != "i2v"
    try:
        extraction = _targets(options, task, [])
    except UserError:
        return False
    return bool(crops(len(kept_frames(item.frames, extraction.source_fps)), extraction))


def is_refused(listing: Sequence[ListedMedia], options: SourceOptions, task: str) -> bool:
    """Whether :func:`select` will take nothing of a source, if all its media can be read."""
    needed = options.missing_captions == "error" and options.default_caption is None
    if not listing or (needed and not all(entry.caption for entry in listing)):
        return True
    return task == "i2v" and all(entry.media_kind == "image" for entry in listing)


def _targets(options: SourceOptions, task: str, notices: list[str]) -> FrameExtraction:
    extraction = options.extraction
    if task != "i2v" or extraction.mode == "full" or 1 not in extraction.target_frames:
        return extraction
    rest = tuple(frames for frames in extraction.target_frames if frames != 1)
    if not rest:
        raise UserError(
            "task=i2v with dataset.target_frames=[1] would learn to copy its first frame: "
            "take longer targets, for example dataset.target_frames=[13,25]."
        )
    notices.append("task=i2v leaves the target of 1 frame out: it would learn to copy its input.")
    return replace(extraction, target_frames=rest)


def _place(
    index: int,
    source: Source,
    items: list[SourceMedia],
    task: str,
    validation_fraction: float,
    notices: list[str],
) -> Iterator[SelectedItem]:
    options = source.options
    extraction = options.extraction
    if any(item.media_kind == "video" for item in items):
        extraction = _targets(options, task, notices)
    short: list[str] = []
    lost: set[int] = set()
    times: Counter[tuple[str, str, str]] = Counter()
    for item in items:
        caption = with_trigger(item.caption or options.default_caption or "", options.trigger_word)
        if item.media_kind == "image":
            windows: tuple[Crop, ...] = ()
            bucket = bucket_size(
                item.size,
                options.resolution,
                enable_bucket=options.enable_bucket,
                bucket_no_upscale=options.bucket_no_upscale,
            )
        else:
            # musubi-tuner ignores both bucket flags when it caches clips.
            bucket = bucket_size(item.size, options.resolution)
            kept = len(kept_frames(item.frames, extraction.source_fps))
            windows = tuple(crops(kept, extraction))
            if not windows:
                short.append(f"{item.name} ({kept} frames)")
                continue
            if extraction.mode == "head":
                has = {crop.frames for crop in windows}
                lost |= {f for f in extraction.target_frames if f <= kept and f not in has}
        # A row given twice is to be seen twice, and the trainer knows its samples by their ids.
        same = (item.name, item.sha256, caption)
        times[same] += 1
        yield SelectedItem(
            id=item_id(index, item, caption, times[same]),
            source=index,
            media_kind=item.media_kind,
            media=item,
            caption=caption,
            bucket=bucket,
            crops=windows,
            held_out=not options.regularisation and is_held_out(item.sha256, validation_fraction),
        )
    if lost:
        notices.append(
            f"dataset.source_fps={extraction.source_fps:g} is below 24, and the trainer then stops "
            f"reading a clip early: targets of {', '.join(str(f) for f in sorted(lost))} frames "
            "are lost. Leave dataset.source_fps unset to keep them."
        )
    if short:
        least = min(extraction.target_frames)
        notices.append(
            f"{len(short)} clips are shorter than every target ({least} frames and up) and are "
            f"left out: {named(short)}."
        )


def item_id(source: int, item: SourceMedia, caption: str, time: int = 1) -> str:
    """A readable key for one item, different for equal media with two captions.

    ``time`` counts from 1 where a source has the very same item more than once.
    Only letters, digits and ``-`` are used, since musubi-tuner puts it into glob patterns.
    """
    stem = unicodedata.normalize("NFKD", PurePosixPath(item.name).stem)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower()[:32] or "item"
    again = (str(time),) if time > 1 else ()
    parts = "\0".join((str(source), item.name, item.sha256, caption, *again))
    return f"{slug}-{hashlib.sha256(parts.encode()).hexdigest()[:10]}"


def is_held_out(sha256: str, fraction: float) -> bool:
    """Whether media with this digest are held out; the same media always fall the same way."""
    return int(sha256[:13], 16) < fraction * 16**13


def dataset_fingerprint(items: Iterable[SelectedItem]) -> str:
    """A digest of what is trained on: media, captions, buckets and crops, in any order."""
    lines = sorted(
        repr(
            (
                item.media.sha256,
                item.caption,
                item.bucket,
                [(crop.position, crop.frames) for crop in item.crops],
                item.held_out,
            )
        )
        for item in items
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
