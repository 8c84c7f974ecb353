"""Recognise pictures, clips and archives by their file names; pure."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from runner.formats.caption_files import TEXT_ENDINGS

MediaKind = Literal["image", "video"]

# Of an animated GIF, WebP or AVIF the first frame is taken, so it is a picture.
IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    *(".jfif", ".jpe", ".avif", ".heic", ".heif", ".tif", ".tiff", ".gif"),
)
VIDEO_EXTENSIONS = (
    *(".mp4", ".mov", ".webm", ".mkv", ".avi"),
    *(".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".3gp", ".flv"),
)
ARCHIVE_EXTENSIONS = (
    *(".zip", ".7z", ".tar", ".tar.gz", ".tgz"),
    *(".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
)

# The formats that a picture may have, whatever its ending, for the `formats` of PIL's Image.open:
# with all of PIL's, a JPG that is PostScript starts Ghostscript. JPEG includes MPO.
# musubi-tuner's Pillow (11.3 or later) reads all but HEIF, whatever a JSONL file's names end in
# (https://github.com/kohya-ss/musubi-tuner/blob/v0.3.4/src/musubi_tuner/dataset/datasources.py).
PIL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "HEIF", "TIFF", "GIF")

# Files that systems make by themselves, which nobody misses.
_UNASKED = ("thumbs.db", "desktop.ini", ".ds_store")


def hidden(name: str) -> bool:
    """Return whether to ignore a file: it is hidden, or was added by macOS."""
    return name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name


def media_kind_of(name: str) -> MediaKind | None:
    """Return the media kind by the file's extension, None for other files."""
    extension = posixpath.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None


def is_archive(name: str) -> bool:
    """Return whether the file's extension is that of an archive that can be read."""
    return name.lower().endswith(ARCHIVE_EXTENSIONS)


def left_over(names: Iterable[str]) -> str | None:
    """Say what lies beside the media and is not read.

    Args:
        names: all files of a source, with forward slashes.

    Returns:
        One sentence with each ending and its number, another with the media that are hidden; None
        if there is nothing of either.
    """
    endings: Counter[str] = Counter()
    unseen: list[str] = []
    for name in names:
        base = posixpath.basename(name)
        if hidden(name):
            # "._a.png" is what macOS notes about a.png.
            if media_kind_of(name) and not (base.startswith("._") or "__MACOSX" in name):
                unseen.append(name)
        elif base.lower() not in _UNASKED and not media_kind_of(name):
            ending = posixpath.splitext(base)[1].lower()
            if ending not in TEXT_ENDINGS:
                endings[ending or "without an ending"] += 1
    said = []
    if endings:
        counts = ", ".join(
            f"{count} {ending}"
            for ending, count in sorted(endings.items(), key=lambda one: (-one[1], one[0]))
        )
        said.append(f"Left out, being neither pictures, clips nor captions: {counts}.")
    if unseen:
        said.append(
            f"Left out, being hidden: {len(unseen)} pictures or clips such as {min(unseen)}."
        )
    return " ".join(said) or None
