"""Text helpers: plurals, sizes, durations, suggestions for misspelt names, encodings; pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(wrong: str, right: Iterable[str], *, limit: int = 1) -> list[str]:
    """Return names in ``right`` that resemble ``wrong``, best first; none if nothing is close."""
    names = sorted(set(right))
    lowered: dict[str, str] = {}
    for name in names:
        lowered.setdefault(name.lower(), name)
    close = difflib.get_close_matches(wrong.lower(), list(lowered), n=limit, cutoff=0.5)
    return [lowered[name] for name in close]


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
    """Suggest the most similar name, or list all if none is similar and there are few."""
    names = sorted(set(right))
    close = nearest(wrong, names)
    if close:
        return f" Did you mean {close[0]}?"
    if 0 < len(names) <= 12:
        return f" There are: {', '.join(names)}."
    return ""


def named(names: Iterable[str], limit: int = 5) -> str:
    """List a few names, and say how many more there are."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """Count a noun: ``1 clip``, ``2 clips``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """Return a text that every terminal can show; names may hold controls, and no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """Format seconds: ``75`` as ``1:15``, ``3700`` as ``1:01:40``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def readable(count: float) -> str:
    """Format bytes: ``740 bytes``, ``3.1 MB`` or ``16.7 GB``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def without_interpolations(value: str) -> str:
    """Escape a text so that OmegaConf, which reads ${...} in any string, gives it back."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def is_text_encoding(name: str) -> bool:
    """Return whether Python knows a text encoding of this name."""
    try:
        b"a".decode(name)
    except UnicodeError:
        return True
    except (LookupError, ValueError):
        return False
    return True
