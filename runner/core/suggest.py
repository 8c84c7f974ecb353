"""The nearest right name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(wrong: str, right: Iterable[str], *, limit: int = 1) -> list[str]:
    """Names in ``right`` that resemble ``wrong``, best first; none when nothing is close."""
    names = sorted(set(right))
    lowered: dict[str, str] = {}
    for name in names:
        lowered.setdefault(name.lower(), name)
    found = difflib.get_close_matches(wrong.lower(), list(lowered), n=limit, cutoff=0.5)
    return [lowered[name] for name in found]


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
    """`` Did you mean X?``, or the whole list when nothing is close and it is short."""
    names = sorted(set(right))
    close = nearest(wrong, names)
    if close:
        return f" Did you mean {close[0]}?"
    if 0 < len(names) <= 12:
        return f" There are: {', '.join(names)}."
    return ""
