"""Select the items of a run from the scanned sources; pure.

This module decides which media are used (and why others are not), and for each item its bucket,
crops, final caption, file names in the run's folder, and side of the validation split.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from runner.core.errors import UserError
from runner.core.text import counted, named
from runner.data.corrections.model import (
    NO_CORRECTION,
    Correction,
    clip_correction,
    picture_correction,
    played_frames,
    target_rate,
)
from runner.data.source_options import SourceOptions
from runner.formats.bucket import Size, bucket_size
from runner.formats.captions import with_trigger
from runner.formats.frames import Crop, FrameExtraction, crops, kept_frames
from runner.formats.media_types import MediaKind

if TYPE_CHECKING:
    from runner.data.sources import SourceMedia
    from runner.data.sources.listing import ListedMedia


@dataclass(frozen=True)
class Source:
    """One source: its options and the result of its scan.

    ``commit`` is set for a Hub dataset; ``unpacked`` counts media extracted by this run;
    ``notices`` are those of its listing.
    """

    options: SourceOptions
    source_kind: str
    path: str
    media: tuple[SourceMedia, ...]
    ignored: tuple[tuple[str, str], ...]
    commit: str | None = None
    unpacked: int = field(default=0, compare=False)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class SelectedItem:
    """One item of the run. ``crops`` is empty for a picture.

    ``repeats`` are those of its folder's name; the source's come on top.
    """

    id: str
    source: int
    media_kind: MediaKind
    media: SourceMedia
    caption: str
    bucket: Size
    crops: tuple[Crop, ...]
    held_out: bool
    correction: Correction = NO_CORRECTION
    repeats: int = 1

    @property
    def media_name(self) -> str:
        """The item's file in the run's ``dataset/media``; its stem is the item key."""
        return self.id + self.media.copy_suffix(self.correction)

    @property
    def cached(self) -> bool:
        """Whether the run uses a copy in the shared cache, not the user's own file."""
        return self.media.file is None or bool(self.correction)

    @property
    def copy_bytes(self) -> int:
        """The largest size of the corrected copy in bytes: that of its pixels."""
        width, height = self.media.size
        return width * height * 3 * (len(self.correction.frames) or 1)

    @property
    def cache_key(self) -> str:
        """The key of that copy."""
        return self.media.cache_key(self.correction)


@dataclass(frozen=True)
class Selection:
    """The items of a run, and one notice for everything left out or worth knowing."""

    items: tuple[SelectedItem, ...]
    notices: tuple[str, ...]

    def of(self, source: int, media_kind: MediaKind, *, held_out: bool) -> list[SelectedItem]:
        """Return the items of one source and media kind on one side of the split, in order."""
        wanted = (source, media_kind, held_out)
        return [i for i in self.items if (i.source, i.media_kind, i.held_out) == wanted]

    @property
    def only_clips(self) -> bool:
        """Whether there are items, and no picture among them."""
        return bool(self.items) and all(item.media_kind == "video" for item in self.items)

    @property
    def has_held_out(self) -> bool:
        """Whether any item is held out."""
        return any(item.held_out for item in self.items)


@dataclass(frozen=True, order=True)
class Shape:
    """What all samples of a batch share; ``bucket`` is in pixels, and a picture has 1 frame."""

    source: int
    media_kind: MediaKind
    bucket: Size
    frames: int


def shapes(sources: Sequence[Source], selection: Selection) -> dict[Shape, int]:
    """Count the samples of each shape in an epoch, repeats included, sorted by shape."""
    counts: dict[Shape, int] = {}
    for item in selection.items:
        if item.held_out:
            continue
        repeats = sources[item.source].options.num_repeats * item.repeats
        for crop in item.crops or (None,):
            shape = Shape(item.source, item.media_kind, item.bucket, crop.frames if crop else 1)
            counts[shape] = counts.get(shape, 0) + repeats
    return dict(sorted(counts.items()))


def most_trained_size(sources: Sequence[Source], selection: Selection) -> Size | None:
    """Return the bucket that most samples of an epoch have, of two equal ones the larger."""
    counts: dict[Size, int] = {}
    for shape, count in shapes(sources, selection).items():
        counts[shape.bucket] = counts.get(shape.bucket, 0) + count
    return max(counts, key=lambda size: (counts[size], math.prod(size), size), default=None)


def select(sources: Sequence[Source], *, task: str, validation_fraction: float) -> Selection:
    """Choose the items of a run, holding ``validation_fraction`` of them out of training.

    Raises:
        UserError: captions are missing and no option says what to do, i2v has only pictures, or
            nothing is left to train on.
    """
    chosen: list[SelectedItem] = []
    notices: list[str] = []
    for index, source in enumerate(sources):
        notices += [*source.notices, *_unreadable(source)]
        left = _captioned(source, notices)
        if task == "i2v":
            left = _clips_only(left, notices)
        chosen += _items_of_source(index, source, left, task, validation_fraction, notices)
    if not chosen:
        raise UserError(_nothing_left(sources, task, notices))
    ordinary = [item for item in chosen if not sources[item.source].options.regularisation]
    notices += _split_notices(ordinary, validation_fraction)
    return Selection(tuple(sorted(chosen, key=lambda item: (item.source, item.id))), tuple(notices))


def _nothing_left(sources: Sequence[Source], task: str, notices: Sequence[str]) -> str:
    """Return the message that there is nothing to train on, and why."""
    where = ", ".join(source.path for source in sources)
    media_kinds = [media.media_kind for source in sources for media in source.media]
    if task == "i2v" and media_kinds and "video" not in media_kinds:
        have = "has" if len(sources) == 1 else "have"
        return (
            f"task=i2v learns motion from clips, and {where} {have} only pictures "
            f"({len(media_kinds)}): add clips, or take task=t2v."
        )
    why = f" {' '.join(notices)}" if notices else ""
    return f"Nothing to train on in {where}.{why}"


def _split_notices(ordinary: Sequence[SelectedItem], fraction: float) -> Iterator[str]:
    """Yield notices on the validation split; UserError if it leaves nothing to train on."""
    held_out = sum(item.held_out for item in ordinary)
    if ordinary and held_out == len(ordinary):
        raise UserError(
            f"dataset.validation_fraction={fraction:g} holds out all {len(ordinary)} items: "
            "lower it."
        )
    if fraction and ordinary and not held_out:
        yield (
            f"dataset.validation_fraction={fraction:g} holds out none of the {len(ordinary)} "
            "items (this can happen with few items): raise it."
        )


def _unreadable(source: Source) -> Iterator[str]:
    for name, why in source.ignored:
        yield f"{name} is left out: {why}."


def _has_caption(media: SourceMedia, options: SourceOptions) -> bool:
    return bool(media.caption) or options.default_caption is not None


def _captioned(source: Source, notices: list[str]) -> list[SourceMedia]:
    missing = [media.name for media in source.media if not _has_caption(media, source.options)]
    if missing and source.options.missing_captions == "error":
        raise UserError(
            f"{len(missing)} of {len(source.media)} media in {source.path} have no caption: "
            f"{named(missing)}. Put a .txt of the same name beside each, or set "
            "dataset.default_caption='...' to caption them all, or "
            "dataset.missing_captions=skip to leave them out."
            + "".join(f" {notice}" for notice in source.notices)
        )
    if missing:
        notices.append(f"{len(missing)} media without a caption are left out: {named(missing)}.")
    return [media for media in source.media if _has_caption(media, source.options)]


def _clips_only(media: list[SourceMedia], notices: list[str]) -> list[SourceMedia]:
    pictures = [one.name for one in media if one.media_kind == "image"]
    if pictures:
        notices.append(
            f"task=i2v learns from clips: {counted(len(pictures), 'picture')} left out: "
            f"{named(pictures)}."
        )
    return [one for one in media if one.media_kind == "video"]


def would_be_selected(media: SourceMedia, options: SourceOptions, task: str) -> bool:
    """Return whether :func:`select` would take the media, judged without the others."""
    if not _has_caption(media, options):
        return False
    if media.media_kind == "image":
        return task != "i2v"
    try:
        extraction = _extraction_for_task(options, task, [])
    except UserError:
        return False
    return bool(crops(len(frames_of(media, options)), extraction))


def correction_of(media: SourceMedia, options: SourceOptions, task: str) -> Correction:
    """Return the correction of media that :func:`select` takes."""
    if media.media_kind == "image":
        return picture_correction(media.mode, media.display, options.background)
    extraction = _extraction_for_task(options, task, [])
    return clip_correction(
        media.size,
        media.frames,
        media.fps,
        media.display,
        extraction,
        target=target_rate(options.fps, extraction.source_fps),
        background=options.background,
    )


def frames_of(media: SourceMedia, options: SourceOptions) -> Sequence[int]:
    """Return the indices of the stored frames that crops are cut from, at the rate of training."""
    source_fps = options.extraction.source_fps
    if source_fps is not None:
        return kept_frames(media.frames, source_fps)
    target = target_rate(options.fps, source_fps)
    return played_frames(media.frames, media.fps, media.display, target)[1]


def is_refused(listing: Sequence[ListedMedia], options: SourceOptions, task: str) -> bool:
    """Return whether :func:`select` would reject the whole source, all its media being readable."""
    needed = options.missing_captions == "error" and options.default_caption is None
    if not listing or (needed and not all(listed.caption for listed in listing)):
        return True
    return task == "i2v" and all(listed.media_kind == "image" for listed in listing)


def _extraction_for_task(options: SourceOptions, task: str, notices: list[str]) -> FrameExtraction:
    extraction = options.extraction
    if task != "i2v" or extraction.mode == "full" or 1 not in extraction.target_frames:
        return extraction
    rest = tuple(frames for frames in extraction.target_frames if frames != 1)
    if not rest:
        raise UserError(
            "task=i2v with dataset.target_frames=[1] would learn to copy its first frame: "
            "take longer targets, for example dataset.target_frames=[13,25]."
        )
    notices.append("task=i2v leaves out the target of 1 frame: it would learn to copy its input.")
    return replace(extraction, target_frames=rest)


def _items_of_source(
    index: int,
    source: Source,
    media: list[SourceMedia],
    task: str,
    validation_fraction: float,
    notices: list[str],
) -> Iterator[SelectedItem]:
    options = source.options
    extraction = options.extraction
    if any(one.media_kind == "video" for one in media):
        extraction = _extraction_for_task(options, task, notices)
    too_short: list[str] = []
    dropped: set[int] = set()
    occurrences: Counter[tuple[str, str, str]] = Counter()
    for one in media:
        caption = with_trigger(one.caption or options.default_caption or "", options.trigger_word)
        if one.media_kind == "image":
            item_crops: tuple[Crop, ...] = ()
            bucket = bucket_size(
                one.size,
                options.resolution,
                enable_bucket=options.enable_bucket,
                bucket_no_upscale=options.bucket_no_upscale,
            )
        else:
            # musubi-tuner ignores both bucket flags when it caches clips.
            bucket = bucket_size(one.size, options.resolution)
            kept = len(frames_of(one, options))
            item_crops = tuple(crops(kept, extraction))
            if not item_crops:
                too_short.append(f"{one.name} ({kept} frames)")
                continue
            if extraction.mode == "head":
                lengths = {crop.frames for crop in item_crops}
                dropped |= {f for f in extraction.target_frames if f <= kept and f not in lengths}
        # A JSONL row may be repeated on purpose; the second item then needs an id of its own.
        same = (one.name, one.sha256, caption)
        occurrences[same] += 1
        yield SelectedItem(
            id=item_id(index, one, caption, occurrences[same]),
            source=index,
            media_kind=one.media_kind,
            media=one,
            caption=caption,
            bucket=bucket,
            crops=item_crops,
            held_out=not options.regularisation and is_held_out(one.sha256, validation_fraction),
            correction=correction_of(one, options, task),
            # How often a regularisation set is seen follows from its weight alone.
            repeats=1 if options.regularisation else one.repeats,
        )
    if dropped:
        targets = ", ".join(str(f) for f in sorted(dropped))
        notices.append(
            f"dataset.source_fps={extraction.source_fps:g} is below 24, so the trainer stops "
            f"reading clips early and cuts no crops of {targets} frames. Leave dataset.source_fps "
            "unset to keep them."
        )
    if too_short:
        shortest = min(extraction.target_frames)
        notices.append(
            f"{len(too_short)} clips are shorter than every target ({shortest} frames and up) and "
            f"are left out: {named(too_short)}."
        )


def item_id(source: int, media: SourceMedia, caption: str, occurrence: int = 1) -> str:
    """Make a readable id for one item; equal media with different captions have different ids.

    Only letters, digits and ``-`` are used, since musubi-tuner puts it into glob patterns.
    ``occurrence`` numbers equal items of one source from 1.
    """
    stem = unicodedata.normalize("NFKD", PurePosixPath(media.name).stem)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower()[:32] or "item"
    again = (str(occurrence),) if occurrence > 1 else ()
    parts = "\0".join((str(source), media.name, media.sha256, caption, *again))
    return f"{slug}-{hashlib.sha256(parts.encode()).hexdigest()[:10]}"


def is_held_out(sha256: str, fraction: float) -> bool:
    """Return whether media with this digest are held out; it depends on the digest alone."""
    return int(sha256[:13], 16) < fraction * 16**13


def dataset_fingerprint(items: Iterable[SelectedItem]) -> str:
    """Digest what is trained on: media, captions, buckets and crops, whatever their order."""
    lines = sorted(
        repr(
            (
                item.media.sha256,
                item.caption,
                item.bucket,
                [(crop.position, crop.frames) for crop in item.crops],
                item.held_out,
                *([item.correction.cache_inputs(copy=True)] if item.correction.changes else []),
                *([item.repeats] if item.repeats > 1 else []),
            )
        )
        for item in items
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
