"""Findings about media that are not trained on as they are stored, or that could mislead; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from runner.data.corrections.model import RATE_TOLERANCE, Correction
from runner.data.report.model import Finding, ReportedItem, finding_each
from runner.data.select import Source
from runner.formats.frames import MODEL_FPS

# What EXIF's numbers of orientations mean.
_TURNED = {
    2: "mirrored",
    3: "by 180 degrees",
    4: "upside down, mirrored",
    5: "to the left, mirrored",
    6: "to the right",
    7: "to the right, mirrored",
    8: "to the left",
}
_HDR = {"pq": "PQ", "hlg": "HLG"}


def misleading(media: Sequence[ReportedItem], sources: Sequence[Source]) -> Iterator[Finding]:
    """Find clips that are trained on, and yet not as a person would expect: the worst first."""
    displays = [medium.item.media.display for medium in media]
    rates = {index: rate for index, rate in enumerate(map(_trained_rate(sources), media)) if rate}
    yield from finding_each(
        media,
        "slow-motion",
        [i for i, (target, rate) in rates.items() if rate > target * (1 + RATE_TOLERANCE)],
        f"are faster than {MODEL_FPS:g} frames per second, and every frame is kept: slow motion is "
        "learned (dataset.fps=auto brings clips to the model's rate)",
        serious=True,
        note=lambda i: _per_second(rates[i][1]),
    )
    yield from finding_each(
        media,
        "cut-short",
        [i for i, display in enumerate(displays) if display.frames_stated is not None],
        "are cut short, with fewer frames than the header says",
        serious=True,
        note=lambda i: f"{media[i].item.media.frames} of about {displays[i].frames_stated} frames",
    )
    yield from finding_each(
        media,
        "interlaced",
        [i for i, display in enumerate(displays) if display.interlaced],
        "are interlaced, and comb-like edges are learned: deinterlace them first, for example with "
        "ffmpeg -i IN -vf bwdif OUT",
        serious=True,
    )
    yield from finding_each(
        media,
        "too-slow",
        [i for i, (target, rate) in rates.items() if rate < target * (1 - RATE_TOLERANCE)],
        "are slower than the rate of training: every frame is kept, and motion is learned too fast",
        serious=True,
        note=lambda i: f"{_per_second(rates[i][1])} as {rates[i][0]:g}",
    )


def corrected(media: Sequence[ReportedItem]) -> Iterator[Finding]:
    """Find media that were corrected, the largest changes first."""
    corrections = [medium.item.correction for medium in media]
    displays = [medium.item.media.display for medium in media]
    rows: tuple[tuple[str, str, Callable[[int], str]], ...] = (
        (
            "turned",
            "are turned as the file says",
            lambda i: _TURNED.get(corrections[i].orientation, ""),
        ),
        (
            "tone-mapped",
            "are HDR and brought to the standard range",
            lambda i: (
                f"{_HDR[corrections[i].transfer]}, peak {corrections[i].peak:g} cd/m2"
                if corrections[i].transfer
                else ""
            ),
        ),
        (
            "blended",
            "are transparent and blended onto dataset.background",
            lambda i: corrections[i].background,
        ),
        (
            "scaled",
            "have more than 8 bits per channel, scaled to 8",
            lambda i: f"white is {corrections[i].white:g}" if corrections[i].white else "",
        ),
        (
            "profile",
            "have colours of another profile, brought to sRGB",
            lambda i: corrections[i].profile,
        ),
        (
            "squared",
            "have pixels that are not square, made square",
            lambda i: _square_note(corrections[i]),
        ),
        (
            "rate",
            "are brought to another rate by the time stamps (dataset.fps)",
            lambda i: _rate_note(media[i]),
        ),
        (
            "shrunk",
            "are huge, read smaller",
            lambda i: f"1/{corrections[i].shrink}" if corrections[i].shrink > 1 else "",
        ),
        (
            "animated",
            "are animated; only the first picture is taken",
            lambda i: f"{displays[i].pictures} pictures" if displays[i].pictures > 1 else "",
        ),
    )
    for category, text, note in rows:
        which = [index for index in range(len(media)) if note(index)]
        yield from finding_each(media, category, which, text, serious=False, note=note)


def _trained_rate(
    sources: Sequence[Source],
) -> Callable[[ReportedItem], tuple[float, float] | None]:
    """Return a function that gives the rate a clip should have, and that of its trained frames.

    It gives None for pictures, and for clips of which the rates are not known.
    """

    def rates(medium: ReportedItem) -> tuple[float, float] | None:
        options, media = sources[medium.item.source].options, medium.item.media
        if media.media_kind == "image" or media.frames < 2:
            return None
        given = options.extraction.source_fps
        if given is not None:
            return (MODEL_FPS, min(given, MODEL_FPS))
        if media.fps is None:
            return None
        target = MODEL_FPS if options.fps in ("auto", "native") else float(options.fps)
        return (target, medium.item.correction.rate or media.fps)

    return rates


def _square_note(correction: Correction) -> str:
    return "" if correction.size is None else f"to {correction.size[0]} x {correction.size[1]}"


def _rate_note(medium: ReportedItem) -> str:
    rate, fps = medium.item.correction.rate, medium.item.media.fps
    if rate is None or fps is None:
        return ""
    kind = "variable, on average " if medium.item.media.display.times else ""
    return f"{kind}{fps:.4g} to {rate:.4g}"


def _per_second(rate: float) -> str:
    return f"{rate:.4g} per second"
