"""Archives of every kind, and looks into them."""

from __future__ import annotations

import io
import signal
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from media_factory import make_clip, make_image

from runner.core.errors import UserError
from runner.data.sources import Scan, locate, scan

BIG = 10**9
TAR_MODES = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}


@contextmanager
def time_limit(seconds: int = 10) -> Iterator[None]:
    """A file that blocks or never ends fails the test."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make_media(folder: Path) -> Path:
    """Two pictures and a clip, with captions, at several depths."""
    make_image(folder / "b.png")
    make_image(folder / "deep" / "日本 é.jpg", (80, 40))
    make_clip(folder / "deep" / "c.mp4", 13)
    (folder / "b.txt").write_text("a picture")
    (folder / "deep" / "日本 é.txt").write_text("a place")
    (folder / "deep" / "c.txt").write_text("a jump")
    (folder / ".empty").write_text("")
    return folder


def as_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))


def as_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path, TAR_MODES[path.suffix]) as archive:  # type: ignore[call-overload]
        archive.add(folder, "./")


def as_7z(path: Path, folder: Path) -> None:
    from py7zr import SevenZipFile

    with SevenZipFile(path, "w") as archive:
        archive.writeall(folder, ".")


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "m.zip": as_zip,
    "m.tar": as_tar,
    "m.tar.gz": as_tar,
    "m.tgz": as_tar,
    "m.tar.bz2": as_tar,
    "m.tar.xz": as_tar,
    "m.7z": as_7z,
}


def found_in(path: Path, max_bytes: int = BIG) -> Scan:
    kind, place = locate(str(path), cwd=path.parent)
    return scan(kind, place, max_bytes=max_bytes)


def seen(found: Scan) -> list[tuple[object, ...]]:
    return [(i.name, i.media_kind, i.sha256, i.size, i.frames, i.caption) for i in found.media]


def refused(path: Path, message: str, max_bytes: int = BIG) -> None:
    with pytest.raises(UserError, match=message) as caught:
        found_in(path, max_bytes)
    assert "\n" not in str(caught.value)


def raw_zip(path: Path, members: dict[bytes, bytes], extra: bytes = b"") -> None:
    """A zip whose names are these bytes, without a word on their encoding."""
    out, central = io.BytesIO(), io.BytesIO()
    for name, data in members.items():
        head = struct.pack("<HHHHHIII", 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data))
        lengths = struct.pack("<HH", len(name), len(extra))
        central.write(b"PK\1\2\x14\0" + head + lengths + bytes(10))
        central.write(struct.pack("<I", out.tell()) + name + extra)
        out.write(b"PK\3\4" + head + lengths + name + extra + data)
    start, length = out.tell(), central.tell()
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), length, start, 0)
    path.write_bytes(out.getvalue() + central.getvalue() + b"PK\5\6" + end)


def tar_member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data) if kind == tarfile.REGTYPE else 0, kind
    member.linkname = "/etc/passwd"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()
