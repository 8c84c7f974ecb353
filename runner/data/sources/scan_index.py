"""Index of the properties of scanned media, so that later runs need not read them again.

There is one file per source, under ``outputs/cache/scans``. A record is valid only for a file with
the same device, inode, size and times. It only saves reading; it is not part of any cache key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runner.core.atomic import write_text
from runner.core.file_identity import Identity
from runner.data.corrections.model import Display
from runner.data.sources.listing import ListedMedia
from runner.data.sources.model import SourceMedia
from runner.data.sources.probe import PROBE_VERSION

# A file modified just before it was read could change again within the clock's resolution, so its
# record is not saved (the "racy" problem of git's index).
RACY_NS = 2_000_000_000


def change_would_show(identity: Identity, read_at_ns: int) -> bool:
    """Return whether a change after the file was read would alter its identity."""
    mtime, ctime = identity[3], identity[4]
    # The modification time may be in the future, from a camera's clock; the inode's time is from
    # this computer.
    changed = max(ctime, mtime if mtime <= read_at_ns else 0)
    return changed < read_at_ns - RACY_NS


class ScanIndex:
    """The records of one source; :meth:`load` reads them, and only :meth:`save` writes."""

    def __init__(self, file: Path, source: Path) -> None:
        self.file, self.source = file, source
        self._before: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._changed = False

    @classmethod
    def load(cls, folder: Path, source: Path) -> ScanIndex:
        """Load the index of ``source`` in ``folder``; empty if there is none that can be used."""
        name = hashlib.sha256(os.fsencode(source)).hexdigest()[:40]
        index = cls(folder / f"{name}.json", source)
        try:
            read = json.loads(index.file.read_text("utf-8"))
            if read["version"] == _version():
                index._before = dict(read["media"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return index

    def recall(self, listed: ListedMedia, identity: Identity) -> SourceMedia | None:
        """Return the recorded media if their file still has this identity, else None."""
        record = self._before.get(listed.name)
        try:
            if record is None or tuple(record["file"]) != identity:
                return None
            width, height = record["size"]
            media = SourceMedia(
                name=listed.name,
                media_kind=listed.media_kind,
                sha256=str(record["sha256"]),
                bytes=int(record["bytes"]),
                size=(int(width), int(height)),
                frames=int(record["frames"]),
                fps=record["fps"],
                mode=record["mode"],
                caption=listed.caption,
                file=listed.file,
                archive=listed.archive,
                member=listed.member,
                identity=identity,
                display=Display.from_record(record["display"]),
            )
        except (KeyError, TypeError, ValueError):
            return None
        self._now[listed.name] = record
        return media

    def note(self, media: SourceMedia, read_at_ns: int) -> None:
        """Record the properties of media, if a later change would be detected."""
        if media.identity is None or not change_would_show(media.identity, read_at_ns):
            return
        self._changed = True
        self._now[media.name] = {
            "file": list(media.identity),
            "sha256": media.sha256,
            "bytes": media.bytes,
            "size": list(media.size),
            "frames": media.frames,
            "fps": media.fps,
            "mode": media.mode,
            "display": media.display.record(),
        }

    def save(self, names: Sequence[str]) -> None:
        """Write the records of the media with these names."""
        if not self._changed:
            return
        known = {**self._before, **self._now}
        media = {name: known[name] for name in names if name in known}
        text = {"version": _version(), "source": os.fspath(self.source), "media": media}
        # Without it media are read again; a cache that can't be written to is reported later.
        with suppress(OSError):
            write_text(self.file, json.dumps(text, separators=(",", ":")) + "\n")
            self._changed = False


def _version() -> str:
    """Return the version of the probing code and of the decoders it uses."""
    return " ".join([f"1.{PROBE_VERSION}", *(_of(name) for name in ("av", "pillow", "pi-heif"))])


def _of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
