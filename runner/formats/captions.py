"""Captions in the form that the text encoders get."""

from __future__ import annotations

import re

# The chat template that Qwen2.5-VL sees a caption in: HEAD, the caption, TAIL.
_ASPECTS = (
    "You are a helpful assistant. Describe the video by detailing the following aspects:",
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the "
    "objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video.",
)
TEMPLATE_HEAD = "<|im_start|>system\n" + " \n".join(_ASPECTS) + "<|im_end|>\n<|im_start|>user\n"
TEMPLATE_TAIL = "<|im_end|>\n<|im_start|>assistant\n"

MAX_TOKENS = 1024  # of caption and tail; the rest is cut off
MAX_GLYPH_TOKENS = 128  # bytes of quoted text, with its frame
_QUOTED = (re.compile(r'"(.*?)"'), re.compile(r"“(.*?)”"))


def with_trigger(caption: str, trigger_word: str | None) -> str:
    """Put the trigger word before a caption, ``"trigger, caption"``, and strip white space.

    A caption that already contains the trigger as a whole word (ignoring case) is only stripped. A
    blank caption becomes the trigger alone.
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


def glyph_text(caption: str) -> str | None:
    """Return what ByT5 reads: ``Text "...". `` for each quoted text, straight quotes first.

    Returns:
        The text, or None when the caption quotes nothing.
    """
    quoted = [text for pattern in _QUOTED for text in pattern.findall(caption)]
    return "".join(f'Text "{text}". ' for text in quoted) or None
