"""Recognise pictures and clips by their file names; pure."""

from __future__ import annotations

import posixpath
from typing import Literal

MediaKind = Literal["image", "video"]

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_EXTENSIONS = (".mp4", ".mov", ".webm", ".mkv", ".avi")


def hidden(name: str) -> bool:
    """Return whether to ignore a file: it is hidden, or was added by macOS."""
    return name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name


def media_kind_of(name: str) -> MediaKind | None:
    """Return the media kind by the file's extension, None for other files."""
    extension = posixpath.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None
