"""Open untrusted zip archives, and check them before anything is extracted."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from runner.core.errors import UserError

_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open an archive for reading.

    Raises:
        UserError: it is not a zip archive, or can't be read.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise UserError(f"{path} is no zip archive, or a damaged one: make it again") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def member_name(member: zipfile.ZipInfo) -> str:
    """Return a member's name; some tools (macOS) write UTF-8 without setting the flag for it."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


def plain(name: str) -> str:
    """Normalise a member's name: without "./", double slashes, or a slash at the end."""
    odd = name.endswith("/") or "//" in name or "./" in name or name.endswith("/.")
    return str(PurePosixPath(name)) if odd else name


def check_archive(path: Path, max_bytes: int) -> None:
    """Check that an archive is safe to extract.

    Raises:
        UserError: extracting it could do harm, or needs more than ``max_bytes`` bytes.
    """
    with open_archive(path) as archive:
        check_members(path, archive.infolist(), max_bytes)


def check_members(path: Path, members: Sequence[zipfile.ZipInfo], max_bytes: int) -> None:
    """Check the members of an open archive as :func:`check_archive` does."""
    seen: set[str] = set()
    total = 0
    for member in members:
        name = member_name(member)
        if reason := _unsafe(member, name):
            raise UserError(f"{path}: refused, its member {name!r} {reason}")
        place = plain(name)
        if place in seen:
            raise UserError(f"{path}: refused, it holds {name!r} twice: keep one of them")
        seen.add(place)
        total += member.file_size
    if total > max_bytes:
        raise UserError(
            f"{path} holds {total / 1e9:.3g} GB unpacked, over the limit of "
            f"{max_bytes / 1e9:.3g} GB: raise dataset.max_archive_gb if that is right"
        )


def _unsafe(member: zipfile.ZipInfo, name: str) -> str | None:
    # As stored: zipfile cuts names at a NUL, and changes separators on some systems.
    stored_name = member.orig_filename
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if "\\" in stored_name or "\0" in stored_name:
        return "has a backslash or a NUL in its name"
    if ".." in name.split("/"):
        return "leads out of its folder (..)"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if member.flag_bits & 0x1:
        return "is encrypted: make the archive without a password"
    if member.compress_type not in _PACKINGS:
        return "is packed in a way that can't be read: use plain deflate"
    return None
