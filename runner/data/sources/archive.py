"""Zip archives from anywhere: opened, named and checked before a byte of them is unpacked."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from runner.core.errors import UserError

_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive, open for reading. Raises UserError when it is none, or can't be read."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise UserError(f"{path} is no zip archive, or a damaged one: make it again") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def member_name(member: zipfile.ZipInfo) -> str:
    """A member's name. Some tools (macOS) write UTF-8 without the flag that says so."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


def plain(name: str) -> str:
    """A member's name as a path: no "./" and no doubled or closing slash in it."""
    odd = name.endswith("/") or "//" in name or "./" in name or name.endswith("/.")
    return str(PurePosixPath(name)) if odd else name


def check_archive(path: Path, max_bytes: int) -> None:
    """Raise UserError if unpacking the archive could do harm, or needs over `max_bytes` bytes."""
    with open_archive(path) as archive:
        check_members(path, archive.infolist(), max_bytes)


def check_members(path: Path, members: Sequence[zipfile.ZipInfo], max_bytes: int) -> None:
    """`check_archive` of an archive that is open."""
    seen: set[str] = set()
    total = 0
    for member in members:
        name = member_name(member)
        if why := _unsafe(member, name):
            raise UserError(f"{path}: refused, its member {name!r} {why}")
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
    # As stored: zipfile cuts a name at a NUL, and turns separators round on some systems.
    full_key = member.orig_filename
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if "\\" in full_key or "\0" in full_key:
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
