"""What was found out about media, so that later runs need not read them again.

One file for each source, under `outputs/cache/scans`. A record counts only for the very file it
was made of, told by device, inode, size and times; it spares reading, and names no work.
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
from runner.data.sources.listing import ListedMedia
from runner.data.sources.model import SourceMedia
from runner.data.sources.probe import PROBE_VERSION

# A file that was changed so shortly before it was read may be changed once more without its times
# telling: what is found out about it is not kept (as git does with its index).
RACY_NS = 2_000_000_000


def change_would_show(identity: Identity, read_at_ns: int) -> bool:
    """Whether a later change of a file read at that time must show in its identity."""
    mtime, ctime = identity[3], identity[4]
    # A file's own time may lie in the future, as a camera's clock has it; that of its inode is
    # this machine's.
    changed = max(ctime, mtime if mtime <= read_at_ns else 0)
    return changed < read_at_ns - RACY_NS


class ScanIndex:
    """The records of one source; `Memo.load` reads them, and only `save` writes."""

    def __init__(self, file: Path, source: Path) -> None:
        self.file, self.source = file, source
        self._before: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._changed = False

    @classmethod
    def load(cls, folder: Path, source: Path) -> ScanIndex:
        """The memo of `source` in `folder`; empty when there is none that can be used."""
        name = hashlib.sha256(os.fsencode(source)).hexdigest()[:40]
        memo = cls(folder / f"{name}.json", source)
        try:
            read = json.loads(memo.file.read_text("utf-8"))
            if read["version"] == _version():
                memo._before = dict(read["media"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return memo

    def recall(self, entry: ListedMedia, identity: Identity) -> SourceMedia | None:
        """What is known of an entry that lies in the file with this identity."""
        record = self._before.get(entry.name)
        try:
            if record is None or tuple(record["file"]) != identity:
                return None
            width, height = record["size"]
            item = SourceMedia(
                name=entry.name,
                media_kind=entry.media_kind,
                sha256=str(record["sha256"]),
                bytes=int(record["bytes"]),
                size=(int(width), int(height)),
                frames=int(record["frames"]),
                fps=record["fps"],
                mode=record["mode"],
                caption=entry.caption,
                file=entry.file,
                archive=entry.archive,
                member=entry.member,
                identity=identity,
            )
        except (KeyError, TypeError, ValueError):
            return None
        self._now[entry.name] = record
        return item

    def note(self, item: SourceMedia, read_at_ns: int) -> None:
        """Take down what was found, where it will hold."""
        if item.identity is None or not change_would_show(item.identity, read_at_ns):
            return
        self._changed = True
        self._now[item.name] = {
            "file": list(item.identity),
            "sha256": item.sha256,
            "bytes": item.bytes,
            "size": list(item.size),
            "frames": item.frames,
            "fps": item.fps,
            "mode": item.mode,
        }

    def save(self, names: Sequence[str]) -> None:
        """Write what is known of the media with these names."""
        if not self._changed:
            return
        known = {**self._before, **self._now}
        media = {name: known[name] for name in names if name in known}
        text = {"version": _version(), "source": os.fspath(self.source), "media": media}
        # Without it media are read once more; a cache that can't be written to is told of later.
        with suppress(OSError):
            write_text(self.file, json.dumps(text, separators=(",", ":")) + "\n")
            self._changed = False


def _version() -> str:
    """Changes with the code that finds things out, and with the decoders it asks."""
    return " ".join([f"1.{PROBE_VERSION}", *(_of(name) for name in ("av", "pillow"))])


def _of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
