"""Zip archives, whose members are read in any order."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from runner.core.errors import UserError
from runner.data.sources.archive import MAX_MEMBERS, Archive, Member, damaged, decoded, is_bomb


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip, whose members are not checked yet.

    Raises:
        UserError: it is no zip archive, or can't be read.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
        raise damaged(path, "zip") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None


class ZipArchive(Archive):
    """A zip archive."""

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        super().__init__(path)
        self._zip = open_zip(path)
        try:
            listed = self._zip.infolist()
            if len(listed) > MAX_MEMBERS:
                raise UserError(f"{path}: refused, it holds over {MAX_MEMBERS:,} files")
            names, self.notices = _zip_names(path, listed)
            self._take(map(_zip_member, listed, names), max_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, handle: Any) -> BinaryIO:
        try:
            member: Any = self._zip.open(handle)
        except ValueError:  # the name before the data is not in the encoding that it is said to be
            raise zipfile.BadZipFile("its name is damaged") from None
        return member

    def close(self) -> None:
        """Close the archive."""
        self._zip.close()


_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_UTF8, _ENCRYPTED = 0x800, 0x1  # flags of a member
# The extra field that Info-ZIP and others put a name's UTF-8 into
# (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.6.9).
_UNICODE_PATH = 0x7075


def _zip_names(path: Path, members: Sequence[zipfile.ZipInfo]) -> tuple[list[str], tuple[str, ...]]:
    """Return the names; those of which a member does not say the encoding are decoded together."""
    told = [_told_name(member) for member in members]
    # zipfile decodes a name without the flag as cp437, which has a character for each byte.
    written = [
        member.orig_filename.encode("cp437")
        for member, name in zip(members, told, strict=True)
        if name is None
    ]
    texts, notices = decoded(path, written)
    rest = iter(texts)
    names = [next(rest) if name is None else name for name in told]
    # Windows programs write backslashes. In the encodings of East Asia that byte is also the second
    # half of some characters, so this is done after decoding.
    return [name.replace("\\", "/") for name in names], notices


def _told_name(member: zipfile.ZipInfo) -> str | None:
    """Return a member's name if its encoding is said, else None."""
    # As stored: zipfile cuts names at a NUL, and changes separators on some systems.
    name = member.orig_filename
    if member.flag_bits & _UTF8 or name.isascii():
        return name
    extra = member.extra
    while len(extra) >= 4:
        field, length = (int.from_bytes(extra[at : at + 2], "little") for at in (0, 2))
        value, extra = extra[4 : 4 + length], extra[4 + length :]
        # The version, and the checksum of the name that this one belongs to.
        checksum = zlib.crc32(name.encode("cp437")).to_bytes(4, "little")
        if field == _UNICODE_PATH and value[:5] == b"\x01" + checksum:
            return value[5:].decode("utf-8", "replace")
    return None


def _zip_member(member: zipfile.ZipInfo, name: str) -> Member:
    reason = None
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "is a link or a special file"
    elif member.flag_bits & _ENCRYPTED:
        reason = "is encrypted: make the archive without a password"
    elif member.compress_type not in _PACKINGS:
        reason = "is packed in a way that can't be read: use plain deflate"
    elif is_bomb(member.file_size, member.compress_size):
        reason = "is a bomb: it unpacks to over 200 times its size"
    return Member(name, member.file_size, member, name.endswith("/"), reason)
