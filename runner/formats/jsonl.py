"""JSON Lines files that name media and captions, as musubi-tuner reads them; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal


def render(media_kind: Literal["image", "video"], rows: Iterable[tuple[str, str]]) -> str:
    """Render one ``{"image_path": ..., "caption": ...}`` (or ``video_path``) per line."""
    return "".join(
        json.dumps({f"{media_kind}_path": path, "caption": caption}, ensure_ascii=False) + "\n"
        for path, caption in rows
    )
