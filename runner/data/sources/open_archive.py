"""Open archives of any kind."""

from __future__ import annotations

import stat
from pathlib import Path

from runner.core.errors import UserError
from runner.core.holes import is_hollow
from runner.data.sources.archive import Archive
from runner.data.sources.packed_archive import SevenZipArchive, TarArchive
from runner.data.sources.zip_archive import ZipArchive


def check_archive(path: Path, max_bytes: int) -> None:
    """Check that an archive is safe to extract.

    Raises:
        UserError: extracting it could do harm, or needs more than ``max_bytes`` bytes.
    """
    open_archive(path, max_bytes).close()


def open_archive(path: Path, max_bytes: int | None = None) -> Archive:
    """Open an archive and check its members; its content says of which kind it is.

    Args:
        path: the archive.
        max_bytes: the maximum uncompressed size, None for archives that were checked before.

    Raises:
        UserError: it is no archive or can't be read, extracting it could do harm, or it needs more
            than ``max_bytes`` bytes.
    """
    kind = archive_kind(path)
    try:
        if kind == "zip":
            return ZipArchive(path, max_bytes)
        if kind == "7z":
            return SevenZipArchive(path, max_bytes)
        return TarArchive(path, kind, max_bytes)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None


_MAGIC = {b"7z\xbc\xaf\x27\x1c": "7z", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
_UNREADABLE = {b"Rar!": "a RAR", b"\x28\xb5\x2f\xfd": "a Zstandard", b"MSCF": "a CAB"}


def archive_kind(path: Path) -> str:
    """Return zip, 7z, tar, or the compression of a tar (gz, bz2, xz), by the file's first bytes.

    Raises:
        UserError: it is not a regular file, is mostly empty, can't be read, or is of a kind that
            can't be.
    """
    try:
        # A pipe would block, and a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file, so no archive")
        with path.open("rb") as stream:
            if is_hollow(stream.fileno()):
                raise UserError(f"{path}: more than half of it was never written: get it again")
            head = stream.read(512)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    for magic, name in _UNREADABLE.items():
        if head.startswith(magic):
            raise UserError(
                f"{path} is {name} archive, which can't be read here: pack it as zip, tar or 7z"
            )
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    is_tar = head[257:262] == b"ustar" or path.suffix.lower() == ".tar"
    return "tar" if is_tar and not head.startswith(b"PK") else "zip"
