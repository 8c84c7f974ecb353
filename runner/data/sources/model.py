"""The media of a source: their properties and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runner.config.dataset_schema import SourceKind
from runner.core.file_identity import Identity
from runner.data.corrections.model import AS_STORED, Correction, Display
from runner.formats.bucket import Size
from runner.formats.media_types import MediaKind
from runner.storage.shared_cache import json_digest


@dataclass(frozen=True)
class SourceMedia:
    """One picture or clip, with its caption.

    Attributes:
        name: path inside its source, with forward slashes.
        media_kind: image or video.
        sha256: hex digest of the media's bytes.
        bytes: their number.
        size: width and height in pixels, as displayed.
        frames: number of frames that can be decoded, 1 for a picture.
        fps: frames per second of a clip, by its time stamps; None if it has none.
        mode: PIL's mode of a picture.
        caption: None when there is none.
        file: the file, for media that are not in an archive.
        archive, member: the archive and the member's name in it.
        identity: of the file or archive, taken before reading, to detect later changes.
        display: how it is displayed.
        repeats: those of its folder's name.
    """

    name: str
    media_kind: MediaKind
    sha256: str
    bytes: int
    size: Size
    frames: int
    fps: float | None
    mode: str | None
    caption: str | None
    file: Path | None
    archive: Path | None
    member: str | None
    identity: Identity | None = None
    display: Display = AS_STORED
    repeats: int = 1

    def copy_suffix(self, correction: Correction) -> str:
        """Return the extension of the file that a run uses: this one, or its corrected copy."""
        if not correction:
            return PurePosixPath(self.name).suffix.lower()
        return ".png" if self.media_kind == "image" else ".mkv"

    def cache_key(self, correction: Correction) -> str:
        """Return the key of the media, or of their corrected copy, in the shared cache."""
        mark = ""
        if correction.only_rgb:
            mark = "-rgb"
        elif correction:
            mark = f"-{json_digest(correction.cache_inputs(copy=True))[:16]}"
        return self.sha256 + mark + self.copy_suffix(correction)

    def cache_inputs(self, correction: Correction) -> dict[str, Any]:
        """Return the cache inputs of the media, or of their corrected copy."""
        if not correction or correction.only_rgb:
            return {"media": self.sha256, "as_rgb": bool(correction)}
        return {"media": self.sha256, "correction": correction.cache_inputs(copy=True)}


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    Attributes:
        source_kind, path: the source.
        items: its media, sorted by name.
        ignored: those left out, as (name, reason).
        notices: what was decided or left out besides.
    """

    source_kind: SourceKind
    path: Path
    media: tuple[SourceMedia, ...]
    ignored: tuple[tuple[str, str], ...]
    notices: tuple[str, ...] = ()
