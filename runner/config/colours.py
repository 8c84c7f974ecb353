"""Colours as options name them; pure."""

from __future__ import annotations

import re

_NAMES = {"white": "#ffffff", "black": "#000000", "gray": "#808080", "grey": "#808080"}
NAMES = tuple(_NAMES)


def hex_colour(text: str) -> str | None:
    """Return a colour as ``#rrggbb``; None if ``text`` is neither a name nor ``#rrggbb``."""
    named = _NAMES.get(text.lower(), text.lower())
    return named if re.fullmatch("#[0-9a-f]{6}", named) else None
