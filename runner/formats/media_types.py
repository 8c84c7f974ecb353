"""Which files are pictures and clips, told from their names; pure."""

from __future__ import annotations

import posixpath
from typing import Literal

MediaKind = Literal["image", "video"]

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_EXTENSIONS = (".mp4", ".mov", ".webm", ".mkv", ".avi")


def hidden(name: str) -> bool:
    """Whether a file is none of the person's: hidden, or a companion that macOS adds."""
    return name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name


def media_kind_of(name: str) -> MediaKind | None:
    """What a file is by its ending, None when it is no medium."""
    extension = posixpath.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None
