"""What a person should know about a dataset before training on it; pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from runner.core.text import counted, named
from runner.data.report.model import Case, Finding, ReportedItem, Tokens
from runner.data.report.near_duplicates import groups, nearest
from runner.data.select import Source
from runner.formats.captions import MAX_GLYPH_TOKENS, MAX_TOKENS, glyph_text
from runner.formats.frames import kept_frames
from runner.formats.media_types import MediaKind

# Enlarged more than this to cover its bucket, a medium has clearly less detail than is trained on.
TINY = 1.5
# More of a medium's area than this cut off is likely to lose what its caption tells of.
CUT = 0.25


def findings(
    media: Sequence[ReportedItem],
    sources: Sequence[Source],
    tokens: Mapping[str, Tokens],
    *,
    measured: bool,
) -> tuple[Finding, ...]:
    """All findings, the worst first. ``measured``: whether pixels were looked at."""
    found = [
        *_pairs(media),
        *_long_captions(media, tokens),
        *_seen(media),
        *_fit(media),
        *_captions(media, sources),
        *_short(media, sources),
    ]
    if measured:
        unseen = [index for index, medium in enumerate(media) if medium.statistics is None]
        found += _each(media, "unseen", unseen, "could not be looked at", serious=True)
    # sorted() keeps the order above among equals.
    return tuple(sorted(found, key=lambda finding: not finding.serious))


def _none(_: int) -> str:
    return ""


def _each(
    media: Sequence[ReportedItem],
    category: str,
    which: Sequence[int],
    text: str,
    *,
    serious: bool,
    note: Callable[[int], str] = _none,
) -> Iterator[Finding]:
    """One finding about each of several media by itself, the worst of them first in `which`.

    `note` says in a word how bad the medium of that index is.
    """
    if not which:
        return
    cases = tuple(Case((i,), note(i)) for i in which)
    shown = [
        media[i].name + (f" ({case.note})" if case.note else "")
        for i, case in zip(which, cases, strict=True)
    ]
    if len(which) == 1:
        text = re.sub("^are ", "is ", text)
    what = _many([media[i] for i in which])
    yield Finding(category, f"{what} {text}", named(shown, 3), serious, cases)


def _many(media: Sequence[ReportedItem]) -> str:
    """``1 clip``, ``2 pictures``, ``3 media``."""
    kinds = {medium.item.media_kind for medium in media}
    if len(kinds) > 1:
        return f"{len(media)} media"
    return counted(len(media), "picture" if kinds == {"image"} else "clip")


def _pairs(media: Sequence[ReportedItem]) -> Iterator[Finding]:
    """What is there more than once, as it is or nearly so."""
    copies: dict[str, list[int]] = defaultdict(list)
    for index, medium in enumerate(media):
        copies[medium.item.media.sha256].append(index)
    first_of_each = [indices[0] for indices in copies.values()]
    alike: list[tuple[int, ...]] = []
    leaks: list[tuple[int, int]] = []
    for category in ("image", "video"):
        trained = _patterns(media, first_of_each, category, held_out=False)
        hashes = list(trained.values())
        indices = list(trained)
        alike += [tuple(indices[number] for number in group) for group in groups(hashes)]
        for index, value in _patterns(media, first_of_each, category, held_out=True).items():
            if (twin := nearest(value, hashes)) is not None:
                leaks.append((index, indices[twin]))
    yield from _leaks(media, leaks)
    same = [tuple(indices) for indices in copies.values() if len(indices) > 1]
    yield from _groups(
        media,
        "equal",
        [group for group in same if _captioned_alike(media, group)],
        "equal media with one caption",
        serious=True,
    )
    yield from _groups(
        media,
        "captioned",
        [group for group in same if not _captioned_alike(media, group)],
        "equal media with different captions (all are trained on)",
        serious=False,
    )
    yield from _groups(media, "alike", alike, "media that look alike", serious=False)


def _patterns(
    media: Sequence[ReportedItem], which: Sequence[int], category: MediaKind, *, held_out: bool
) -> dict[int, int]:
    """The hash of each of these media; a flat or dark one has no pattern to compare."""
    return {
        index: statistics.hash
        for index in which
        if (media[index].item.media_kind, media[index].item.held_out) == (category, held_out)
        if (statistics := media[index].statistics) is not None
        and not (statistics.flat or statistics.dark)
    }


def _captioned_alike(media: Sequence[ReportedItem], group: Sequence[int]) -> bool:
    return len({media[index].item.caption for index in group}) == 1


def _groups(
    media: Sequence[ReportedItem],
    category: str,
    found: Sequence[tuple[int, ...]],
    text: str,
    *,
    serious: bool,
) -> Iterator[Finding]:
    """One finding about groups of media that belong together."""
    if not found:
        return
    names = [f"({named([media[i].name for i in group], 2)})" for group in found]
    what = f"{counted(len(found), 'group')} of {text}"
    yield Finding(category, what, named(names, 3), serious, tuple(Case(group) for group in found))


def _leaks(media: Sequence[ReportedItem], pairs: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    if not pairs:
        return
    names = [f"{media[held_out].name} and {media[trained].name}" for held_out, trained in pairs]
    yield Finding(
        "leak",
        f"{counted(len(pairs), 'held-out item')} {'is' if len(pairs) == 1 else 'are'} nearly equal "
        "to what is trained on, so that eval/loss says less",
        named(names, 3),
        True,
        tuple(Case(pair, "held out, and trained on") for pair in pairs),
    )


def _long_captions(
    media: Sequence[ReportedItem], tokens: Mapping[str, Tokens]
) -> Iterator[Finding]:
    over = {c: length for c, length in tokens.items() if length.count > MAX_TOKENS}
    what = f"are captioned with more than the encoder's {MAX_TOKENS:,} tokens, and the rest is lost"
    for exact, text in ((True, ""), (False, ", by estimate (the tokenizer is not here yet)")):
        which = [
            i
            for i, medium in enumerate(media)
            if (length := over.get(medium.item.caption)) is not None and length.exact == exact
        ]
        yield from _each(
            media,
            "long-caption" if exact else "maybe-long-caption",
            sorted(which, key=lambda i: -over[media[i].item.caption].count),
            what + text,
            serious=True,
            note=lambda i: f"{over[media[i].item.caption].count:,} tokens",
        )
    texts = {i: glyph_text(medium.item.caption) for i, medium in enumerate(media)}
    # ByT5 reads bytes, and an end mark.
    quoted = {i: len(text.encode()) + 1 for i, text in texts.items() if text is not None}
    yield from _each(
        media,
        "long-quote",
        sorted((i for i, n in quoted.items() if n > MAX_GLYPH_TOKENS), key=lambda i: -quoted[i]),
        f"are captioned with over {MAX_GLYPH_TOKENS} bytes of quoted text, and the rest is lost",
        serious=True,
    )


def _seen(media: Sequence[ReportedItem]) -> Iterator[Finding]:
    statistics = {
        i: medium.statistics for i, medium in enumerate(media) if medium.statistics is not None
    }
    sharpness = {i: one.sharpness for i, one in statistics.items()}
    yield from _each(
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
        ("turned", "are upright by EXIF data alone, which training ignores"),
    ):
        which = [i for i, one in statistics.items() if getattr(one, category)]
        yield from _each(media, category, which, text, serious=True)


def _fit(media: Sequence[ReportedItem]) -> Iterator[Finding]:
    tiny = [i for i, medium in enumerate(media) if medium.scale > TINY]
    yield from _each(
        media,
        "tiny",
        sorted(tiny, key=lambda i: -media[i].scale),
        f"are tiny, enlarged over {TINY:g} times to fill the bucket",
        serious=True,
        note=lambda i: f"{media[i].scale:.1f}x",
    )
    cut = [i for i, medium in enumerate(media) if medium.cut > CUT]
    yield from _each(
        media,
        "cut",
        sorted(cut, key=lambda i: -media[i].cut),
        f"are cut by over {CUT:.0%} to fit the bucket",
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
    yield from _each(media, "default-caption", default, text, serious=False)
    empty = [i for i, medium in enumerate(media) if not medium.item.caption]
    yield from _each(media, "empty-caption", empty, "are captioned with nothing", serious=True)


def _short(media: Sequence[ReportedItem], sources: Sequence[Source]) -> Iterator[Finding]:
    lost: dict[int, str] = {}
    for index, medium in enumerate(media):
        extraction = sources[medium.item.source].options.extraction
        if not medium.item.crops or extraction.mode == "full":
            continue
        kept = len(kept_frames(medium.item.media.frames, extraction.source_fps))
        missing = [str(frames) for frames in extraction.target_frames if frames > kept]
        if missing:
            lost[index] = f"{counted(kept, 'frame')}, no crop of {', '.join(missing)}"
    yield from _each(
        media,
        "short",
        list(lost),
        "are too short for some targets",
        serious=False,
        note=lost.__getitem__,
    )
