"""Captions as the text encoder is given them."""

from __future__ import annotations

import re


def with_trigger(caption: str, trigger_word: str | None) -> str:
    """`"trigger, caption"`, stripped of outer white space.

    The trigger is not put twice: a caption that holds it as a whole word, in any case, stays as it
    is. A blank caption becomes the trigger alone; without a trigger only the stripping is done.
    """
    caption = caption.strip()
    trigger = (trigger_word or "").strip()
    if not trigger:
        return caption
    if not caption:
        return trigger
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"
