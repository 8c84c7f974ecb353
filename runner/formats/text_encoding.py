"""Decide in which encoding texts were written, from all texts of a dataset together; pure.

A mark at the beginning (UTF-8, UTF-16, UTF-32) and valid UTF-8 leave no doubt. The other texts of a
dataset have one encoding, the one in which they are most likely: each candidate decodes them, and
:mod:`runner.formats.text_likelihood` says how likely the result is as writing.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass

from runner.formats.text_likelihood import CANDIDATES, Candidate, likelihood, noise

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Natural logarithms. The best candidate must be this much likelier than the next one.
_MARGIN = 2.0
# How much less likely than another candidate's a single text may be.
_TOLERANCE = 8.0
# Enough of a text, and of all, to decide.
_SAMPLE, _SAMPLES = 4_000, 400_000


@dataclass(frozen=True)
class DecodedTexts:
    """Texts, and what had to be decided to read them.

    Attributes:
        texts: the texts that could be decoded, by name.
        encodings: the encoding of each text that is not UTF-8, by name.
        guessed: the names of those whose encoding was guessed.
        undecided: the names of the texts whose encoding could not be decided.
        damaged: the names of the texts that are not in the encoding of their mark or the caller.
    """

    texts: Mapping[str, str]
    encodings: Mapping[str, str]
    guessed: frozenset[str]
    undecided: tuple[str, ...]
    damaged: tuple[str, ...]


def decode_texts(contents: Mapping[str, bytes], encoding: str | None) -> DecodedTexts:
    """Decode texts that may be in different encodings.

    Args:
        contents: the texts as stored, by name.
        encoding: the encoding of those without a mark that are not UTF-8; None to decide.
    """
    texts: dict[str, str] = {}
    encodings: dict[str, str] = {}
    damaged: list[str] = []
    others: dict[str, bytes] = {}
    for name, content in contents.items():
        marked = next((codec for mark, codec in _MARKS if content.startswith(mark)), None)
        text = _plain(content, encoding) if marked is None else None
        if marked is not None:
            text = _decoded(content, "utf-8-sig" if marked == "utf-8" else marked)
            if text is None:
                damaged.append(name)
                continue
            if marked != "utf-8":
                encodings[name] = marked
        if text is None:
            others[name] = content
        else:
            texts[name] = text
    guessed: frozenset[str] = frozenset()
    chosen = encoding
    if others and encoding is None:
        chosen = _decide(others)
        if chosen is None:
            return DecodedTexts(texts, encodings, guessed, tuple(others), tuple(damaged))
        guessed = frozenset(others)
    if others and (candidate := next((c for c in CANDIDATES if c.codec == chosen), None)):
        # A few characters can be valid UTF-8 by accident.
        rest = {n: t for n, t in contents.items() if n in texts and n not in encodings}
        accidents = {n: t for n, t in rest.items() if _is_accident(t, candidate)}
        others, guessed = others | accidents, guessed and guessed | frozenset(accidents)
    for name, content in others.items():
        text = _decoded(content, chosen or "")
        if text is None or _has_zeros(text.count("\0"), len(text)):
            damaged.append(name)
        else:
            texts[name], encodings[name] = text, chosen or ""
    return DecodedTexts(texts, encodings, guessed, (), tuple(damaged))


def _is_accident(content: bytes, candidate: Candidate) -> bool:
    """Return whether a text that is valid UTF-8 is likelier in the encoding of the others."""
    if content.isascii() or len(content) > _SAMPLE or content.startswith(codecs.BOM_UTF8):
        return False
    text = _decoded(content, candidate.codec)
    if text is None:
        return False
    as_utf8 = max(likelihood(content.decode("utf-8"), other) for other in CANDIDATES)
    return likelihood(text, candidate) > as_utf8 - _MARGIN


def _plain(content: bytes, encoding: str | None) -> str | None:
    """Decode UTF-8 without a mark; None for what is not, or could be in the caller's encoding."""
    text = _decoded(content, "utf-8")
    if text is None or _has_zeros(text.count("\0"), len(text)):
        return None
    if encoding is not None and text.isascii():
        # Encodings of 7 bits, and UTF-16, write other characters in bytes of ASCII.
        return None if _decoded(content, encoding) != text else text
    return text


def _has_zeros(zeros: int, length: int) -> bool:
    """Return whether so many characters are zero as only in UTF-16 that was read otherwise."""
    return zeros * 4 >= length > 0


def _decoded(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeError:
        return None


def _decide(contents: Mapping[str, bytes]) -> str | None:
    """Return the encoding in which all texts are most likely, None if there is a doubt."""
    if any(content.count(0) for content in contents.values()):
        return None
    samples: dict[str, bytes] = {}
    taken = 0
    for name, content in contents.items():
        if taken < _SAMPLES:
            samples[name] = content
            taken += min(len(content), _SAMPLE)
    # By what they decode to, since many encodings agree about a text.
    scores: dict[tuple[str, ...], tuple[float, Candidate]] = {}
    singly: dict[str, float] = dict.fromkeys(samples, float("-inf"))
    own: dict[Candidate, dict[str, float]] = {}
    for candidate in CANDIDATES:
        decoded = {name: _decoded(content, candidate.codec) for name, content in samples.items()}
        own[candidate] = {
            name: likelihood(text[:_SAMPLE], candidate)
            for name, text in decoded.items()
            if text is not None
        }
        for name, score in own[candidate].items():
            singly[name] = max(singly[name], score + candidate.prior)
        if any(_decoded(content, candidate.codec) is None for content in contents.values()):
            continue
        total = candidate.prior + sum(own[candidate].values())
        key = tuple(text or "" for text in decoded.values())
        if key not in scores or scores[key][0] < total:
            scores[key] = total, candidate
    ranked = sorted(scores.values(), key=lambda scored: -scored[0])
    if not ranked:
        return None
    best, chosen = ranked[0]
    unlikely = noise(samples.values())
    if best < unlikely or (len(ranked) > 1 and best - ranked[1][0] < _MARGIN):
        return None
    for name, score in own[chosen].items():
        if score + chosen.prior < singly[name] - _TOLERANCE:
            return None  # This text is in another encoding than the rest.
        if score < noise([samples[name]]) - _TOLERANCE:
            return None
    return chosen.codec
