"""Untrusted archives (zip, tar, 7z): all members are checked before any is read.

A zip is read in any order. Of a tar, and of what must be decompressed as a whole (tar.gz and the
like, 7z), members are slices of a file: the tar itself, or an unnamed temporary one, of which
nothing is left whatever ends the process.
"""

from __future__ import annotations

import lzma
import re
import time
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

from runner.core.errors import UserError
from runner.core.file_identity import identity_of
from runner.formats.name_encoding import LANGUAGES, encoding_of

# What reading a damaged member may raise.
READ_ERRORS = (
    *(OSError, EOFError, KeyError, MemoryError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
# Nobody has as many files, and listing more takes memory and time without end.
MAX_MEMBERS = 1_000_000


@dataclass(frozen=True)
class Member:
    """A file or folder of an archive, as its list says.

    Attributes:
        name: decoded, with forward slashes.
        size: in bytes, unpacked.
        handle: what the archive's reader opens it by.
        is_folder: whether it is a folder.
        refused: why it can't be taken, None if it can.
    """

    name: str
    size: int
    handle: Any
    is_folder: bool = False
    refused: str | None = None


class Archive(AbstractContextManager["Archive"]):
    """An open archive, all members of which are safe to extract.

    Attributes:
        path: the archive.
        identity: the file's, when it was opened.
        began: when it was opened, in nanoseconds since 1970.
        sizes: the files in it by name, with their sizes unpacked.
        notices: what a person should know of its names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.time_ns()
        self.identity = identity_of(path.stat())
        self.sizes: dict[str, int] = {}
        self.notices: tuple[str, ...] = ()
        self._handles: dict[str, Any] = {}

    def open(self, name: str) -> BinaryIO:
        """Open a member for reading, from any thread; reading raises :data:`READ_ERRORS`."""
        return self._open(self._handles[name])

    @abstractmethod
    def _open(self, handle: Any) -> BinaryIO: ...

    @abstractmethod
    def close(self) -> None:
        """Close the archive; members can't be read afterwards."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, members: Iterable[Member], max_bytes: int | None) -> None:
        """Check the members, and have their files ready to be opened.

        Raises:
            UserError: extracting them could do harm, or needs more than ``max_bytes`` bytes.
        """
        seen: set[str] = set()
        for member in members:
            if reason := _unsafe(member):
                raise UserError(f"{self.path}: refused, its member {member.name!r} {reason}")
            place = _plain(member.name)
            if place in seen:
                raise UserError(
                    f"{self.path}: refused, it holds {member.name!r} twice: keep one of them"
                )
            seen.add(place)
            if not member.is_folder:
                self.sizes[place] = member.size
                self._handles[place] = member.handle
            if len(seen) > MAX_MEMBERS:
                raise UserError(f"{self.path}: refused, it holds over {MAX_MEMBERS:,} files")
        check_size(self.path, sum(self.sizes.values()), max_bytes)


def check_size(path: Path, size: int, max_bytes: int | None) -> None:
    """Check that an archive unpacks to no more than ``max_bytes`` bytes.

    Raises:
        UserError: it does.
    """
    if max_bytes is not None and size > max_bytes:
        raise UserError(
            f"{path} holds {size / 1e9:.3g} GB unpacked, over the limit of "
            f"{max_bytes / 1e9:.3g} GB: raise dataset.max_archive_gb if that is right"
        )


def damaged(path: Path, kind: str) -> UserError:
    """Return the error for an archive that can't be read as one of this kind."""
    return UserError(f"{path} is no {kind} archive, or a damaged one: make it again")


def decoded(path: Path, names: Sequence[bytes]) -> tuple[list[str], tuple[str, ...]]:
    """Decode names of unknown encoding, all in the same; a notice says which it is.

    Returns:
        The names, and the notice if there is one.
    """
    encoding = encoding_of(names)
    texts = [name.decode(encoding) for name in names]
    if encoding == "utf-8":
        return texts, ()
    example = next(text for text in texts if not text.isascii())
    return texts, (
        f"{path.name} does not say how its file names are encoded: they are read as {encoding} "
        f"({LANGUAGES[encoding]}), such as {example.replace(chr(92), '/')}.",
    )


# Media hardly shrink, so what unpacks to this many bytes and times its size is no dataset.
_BOMB_BYTES = 1 << 30
_BOMB_RATIO = 200


def is_bomb(unpacked: int, packed: int) -> bool:
    """Return whether so many bytes can't honestly be packed into so few."""
    return unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed


def _plain(name: str) -> str:
    """Normalise a member's name: without "./", double slashes, or a slash at the end."""
    odd = name.endswith("/") or "//" in name or "./" in name or name.endswith("/.")
    return str(PurePosixPath(name)) if odd else name


def _unsafe(member: Member) -> str | None:
    name = member.name
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if "\0" in name:
        return "has a NUL in its name"
    if ".." in name.split("/"):
        return "leads out of its folder (..)"
    if member.size < 0:
        return "has a size below zero"
    return member.refused
