"""The media of a source: their properties and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runner.config.schema import SourceKind
from runner.core.file_identity import Identity
from runner.formats.bucket import Size
from runner.formats.media_types import MediaKind


@dataclass(frozen=True)
class SourceMedia:
    """One picture or clip, with its caption.

    Attributes:
        name: path inside its source, with forward slashes.
        media_kind: image or video.
        sha256: hex digest of the media's bytes.
        bytes: their number.
        size: width and height in pixels, as stored.
        frames: number of frames that can be decoded, 1 for a picture.
        fps: frames per second of a clip, if stated.
        mode: PIL's mode of a picture.
        caption: None when there is none.
        file: the file, for media that are not in an archive.
        archive, member: the archive and the member's name in it.
        identity: of the file or archive, taken before reading, to detect later changes.
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

    @property
    def as_rgb(self) -> bool:
        """Whether a run needs an RGB copy of the picture, since musubi-tuner crashes on RGBA."""
        return self.media_kind == "image" and self.mode != "RGB"

    @property
    def cache_key(self) -> str:
        """The key of the media in the shared cache."""
        suffix = ".png" if self.as_rgb else PurePosixPath(self.name).suffix.lower()
        return self.sha256 + ("-rgb" if self.as_rgb else "") + suffix

    @property
    def cache_inputs(self) -> dict[str, Any]:
        """The cache inputs of the media in the shared cache."""
        return {"media": self.sha256, "as_rgb": self.as_rgb}


@dataclass(frozen=True)
class Scan:
    """The result of a scan: media sorted by name, and those left out as (name, reason)."""

    source_kind: SourceKind
    path: Path
    media: tuple[SourceMedia, ...]
    ignored: tuple[tuple[str, str], ...]
