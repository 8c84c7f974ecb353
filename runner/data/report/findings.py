"""Findings about a dataset that the user should know before training on it; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from runner.core.text import counted, named
from runner.data.report.corrected import corrected, misleading
from runner.data.report.model import Case, Finding, ReportedItem, Tokens, finding_each
from runner.data.report.near_duplicates import groups, nearest
from runner.data.select import Source, frames_of
from runner.formats.captions import MAX_GLYPH_TOKENS, MAX_TOKENS, glyph_text
from runner.formats.media_types import MediaKind

# Media enlarged by a larger factor than this to cover their bucket clearly lack detail.
MAX_ENLARGEMENT = 1.5
# If a larger fraction of the area is cut off, something that the caption names is likely lost.
MAX_CUT = 0.25


def findings(
    media: Sequence[ReportedItem],
    sources: Sequence[Source],
    tokens: Mapping[str, Tokens],
    *,
    measured: bool,
) -> tuple[Finding, ...]:
    """Return all findings, the worst first.

    Args:
        media: the items of the run with their figures.
        sources: the sources of the run.
        tokens: the length of each caption.
        measured: whether image statistics were measured.
    """
    result = [
        *misleading(media, sources),
        *_duplicates(media),
        *_long_captions(media, tokens),
        *_image_quality(media),
        *_bucket_fit(media),
        *_captions(media, sources),
        *_short_clips(media, sources),
        *corrected(media),
    ]
    if measured:
        unseen = [index for index, medium in enumerate(media) if medium.statistics is None]
        result += finding_each(media, "unseen", unseen, "could not be analysed", serious=True)
    # sorted() keeps the order above among equals.
    return tuple(sorted(result, key=lambda finding: not finding.serious))


def _duplicates(media: Sequence[ReportedItem]) -> Iterator[Finding]:
    """Find duplicates and near duplicates."""
    copies: dict[str, list[int]] = defaultdict(list)
    for index, medium in enumerate(media):
        copies[medium.item.media.sha256].append(index)
    first_of_each = [indices[0] for indices in copies.values()]
    near: list[tuple[int, ...]] = []
    leaks: list[tuple[int, int]] = []
    for media_kind in ("image", "video"):
        trained = _hashes(media, first_of_each, media_kind, held_out=False)
        hashes = list(trained.values())
        indices = list(trained)
        near += [tuple(indices[number] for number in group) for group in groups(hashes)]
        for index, value in _hashes(media, first_of_each, media_kind, held_out=True).items():
            if (closest := nearest(value, hashes)) is not None:
                leaks.append((index, indices[closest]))
    yield from _leaks(media, leaks)
    same = [tuple(indices) for indices in copies.values() if len(indices) > 1]
    yield from _about_groups(
        media,
        "equal",
        [group for group in same if _same_caption(media, group)],
        "equal media with one caption",
        serious=True,
    )
    yield from _about_groups(
        media,
        "captioned",
        [group for group in same if not _same_caption(media, group)],
        "equal media with different captions (all are trained on)",
        serious=False,
    )
    yield from _about_groups(media, "alike", near, "near duplicates", serious=False)


def _hashes(
    media: Sequence[ReportedItem], which: Sequence[int], media_kind: MediaKind, *, held_out: bool
) -> dict[int, int]:
    """Return the hashes of these media, except flat and dark ones, which can't be compared."""
    return {
        index: statistics.hash
        for index in which
        if (media[index].item.media_kind, media[index].item.held_out) == (media_kind, held_out)
        if (statistics := media[index].statistics) is not None
        and not (statistics.flat or statistics.dark)
    }


def _same_caption(media: Sequence[ReportedItem], group: Sequence[int]) -> bool:
    return len({media[index].item.caption for index in group}) == 1


def _about_groups(
    media: Sequence[ReportedItem],
    category: str,
    media_groups: Sequence[tuple[int, ...]],
    text: str,
    *,
    serious: bool,
) -> Iterator[Finding]:
    """Make one finding, with a case for each group of equal or similar media."""
    if not media_groups:
        return
    names = [f"({named([media[i].name for i in group], 2)})" for group in media_groups]
    what = f"{counted(len(media_groups), 'group')} of {text}"
    yield Finding(
        category, what, named(names, 3), serious, tuple(Case(group) for group in media_groups)
    )


def _leaks(media: Sequence[ReportedItem], pairs: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    if not pairs:
        return
    names = [f"{media[held_out].name} and {media[trained].name}" for held_out, trained in pairs]
    yield Finding(
        "leak",
        f"{counted(len(pairs), 'held-out item')} {'is' if len(pairs) == 1 else 'are'} nearly equal "
        "to training items, so eval/loss is lower than it would be on new media",
        named(names, 3),
        True,
        tuple(Case(pair, "held out, and trained on") for pair in pairs),
    )


def _long_captions(
    media: Sequence[ReportedItem], tokens: Mapping[str, Tokens]
) -> Iterator[Finding]:
    too_long = {c: length for c, length in tokens.items() if length.count > MAX_TOKENS}
    what = f"are captioned with more than the encoder's {MAX_TOKENS:,} tokens, and the rest is lost"
    for exact, text in ((True, ""), (False, ", by estimate (the tokenizer is not downloaded yet)")):
        which = [
            i
            for i, medium in enumerate(media)
            if (length := too_long.get(medium.item.caption)) is not None and length.exact == exact
        ]
        yield from finding_each(
            media,
            "long-caption" if exact else "maybe-long-caption",
            sorted(which, key=lambda i: -too_long[media[i].item.caption].count),
            what + text,
            serious=True,
            note=lambda i: f"{too_long[media[i].item.caption].count:,} tokens",
        )
    texts = {i: glyph_text(medium.item.caption) for i, medium in enumerate(media)}
    # ByT5 reads one token per byte, and an end token.
    quoted = {i: len(text.encode()) + 1 for i, text in texts.items() if text is not None}
    yield from finding_each(
        media,
        "long-quote",
        sorted((i for i, n in quoted.items() if n > MAX_GLYPH_TOKENS), key=lambda i: -quoted[i]),
        f"are captioned with over {MAX_GLYPH_TOKENS} bytes of quoted text, and the rest is lost",
        serious=True,
    )


def _image_quality(media: Sequence[ReportedItem]) -> Iterator[Finding]:
    statistics = {
        i: medium.statistics for i, medium in enumerate(media) if medium.statistics is not None
    }
    sharpness = {i: one.sharpness for i, one in statistics.items()}
    yield from finding_each(
        media,
        "blurred",
        sorted((i for i, one in statistics.items() if one.blurred), key=sharpness.__getitem__),
        "are blurred",
        serious=True,
        note=lambda i: f"sharpness {sharpness[i]:.0f}",
    )
    for category, text in (
        ("dark", "are nearly black"),
        ("flat", "are one flat colour"),
    ):
        which = [i for i, one in statistics.items() if getattr(one, category)]
        yield from finding_each(media, category, which, text, serious=True)


def _bucket_fit(media: Sequence[ReportedItem]) -> Iterator[Finding]:
    tiny = [i for i, medium in enumerate(media) if medium.scale > MAX_ENLARGEMENT]
    yield from finding_each(
        media,
        "tiny",
        sorted(tiny, key=lambda i: -media[i].scale),
        f"are tiny, enlarged more than {MAX_ENLARGEMENT:g} times to fill the bucket",
        serious=True,
        note=lambda i: f"{media[i].scale:.1f}x",
    )
    cut = [i for i, medium in enumerate(media) if medium.cut > MAX_CUT]
    yield from finding_each(
        media,
        "cut",
        sorted(cut, key=lambda i: -media[i].cut),
        f"are cut by over {MAX_CUT:.0%} to fit the bucket",
        serious=False,
        note=lambda i: f"{media[i].cut:.0%}",
    )


def _captions(media: Sequence[ReportedItem], sources: Sequence[Source]) -> Iterator[Finding]:
    default = [
        i
        for i, medium in enumerate(media)
        if not medium.item.media.caption and sources[medium.item.source].options.default_caption
    ]
    text = "are without a caption and get dataset.default_caption"
    yield from finding_each(media, "default-caption", default, text, serious=False)
    empty = [i for i, medium in enumerate(media) if not medium.item.caption]
    yield from finding_each(
        media, "empty-caption", empty, "are left with an empty caption", serious=True
    )


def _short_clips(media: Sequence[ReportedItem], sources: Sequence[Source]) -> Iterator[Finding]:
    notes: dict[int, str] = {}
    for index, medium in enumerate(media):
        extraction = sources[medium.item.source].options.extraction
        if not medium.item.crops or extraction.mode == "full":
            continue
        kept = len(frames_of(medium.item.media, sources[medium.item.source].options))
        missing = [str(frames) for frames in extraction.target_frames if frames > kept]
        if missing:
            notes[index] = f"{counted(kept, 'frame')}, no crop of {', '.join(missing)}"
    yield from finding_each(
        media,
        "short",
        list(notes),
        "are too short for some of dataset.target_frames",
        serious=False,
        note=notes.__getitem__,
    )
