"""What a source holds: media with their facts and captions."""

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

    name: path inside its source, forward slashes. sha256: hex digest of the media's bytes.
    size: width and height in pixels, as stored. frames: those that can be decoded, 1 for a picture.
    fps: of a clip, if it says. mode: PIL's mode of a picture. caption: None when there is none.
    The bytes lie in `file`, or in `member` of `archive`; `identity` is that file's before they were
    read, so that a change since then shows.
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
        """Whether a run needs an RGB copy instead of the file: musubi-tuner crashes on RGBA."""
        return self.media_kind == "image" and self.mode != "RGB"

    @property
    def cache_key(self) -> str:
        """The name of the media in the store."""
        suffix = ".png" if self.as_rgb else PurePosixPath(self.name).suffix.lower()
        return self.sha256 + ("-rgb" if self.as_rgb else "") + suffix

    @property
    def cache_inputs(self) -> dict[str, Any]:
        """What the media in the store is made of."""
        return {"media": self.sha256, "as_rgb": self.as_rgb}


@dataclass(frozen=True)
class Scan:
    """What a source holds: items sorted by name, and media left out as (name, why)."""

    source_kind: SourceKind
    path: Path
    items: tuple[SourceMedia, ...]
    ignored: tuple[tuple[str, str], ...]
