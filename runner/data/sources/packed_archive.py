"""Archives of which members are slices of one file: tar, and what is decompressed as a whole."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from runner.core.errors import UserError
from runner.data.sources.archive import Archive, Member, check_size, damaged, decoded, is_bomb

if TYPE_CHECKING:
    from py7zr import SevenZipFile
    from py7zr.py7zr import ArchiveFile

_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
# A member's header and its long names; a stated length may be anything.
_MAX_HEADER = 1 << 20

_Slice = tuple[int, int]  # offset and size


class TarArchive(Archive):
    """A tar archive; a compressed one is unpacked into a temporary file when it is opened."""

    def __init__(self, path: Path, kind: str, max_bytes: int | None) -> None:
        super().__init__(path)
        self._file: BinaryIO = (
            path.open("rb") if kind == "tar" else _decompressed(path, kind, max_bytes)
        )
        try:
            members = self._members(kind)
            names, self.notices = decoded(
                path, [one.name.encode("utf-8", "surrogateescape") for one in members]
            )
            self._take(map(_tar_member, members, names), max_bytes)
        except BaseException:
            self.close()
            raise

    def _members(self, kind: str) -> list[tarfile.TarInfo]:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        members: list[tarfile.TarInfo] = []
        headers = cast(BinaryIO, _Headers(self._file))
        try:
            with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8") as archive:
                for member in archive:
                    # A size below zero would lead back to members that were read.
                    if member.size < 0 or member.offset_data + member.size > size:
                        raise tarfile.ReadError
                    members.append(member)
                end = archive.offset
        except (tarfile.TarError, ValueError, OverflowError, EOFError):
            raise damaged(self.path, "tar" if kind == "tar" else f"tar.{kind}") from None
        self._file.seek(end)
        # tarfile takes a damaged header for the end.
        if self._file.read(_BLOCK) != bytes(_BLOCK):
            raise UserError(
                f"{self.path} is damaged or cut short after {len(members)} members: make it again"
            )
        return members

    def _open(self, handle: Any) -> BinaryIO:
        return _slice(self._file, handle)

    def close(self) -> None:
        """Close the archive, and delete the temporary file if there is one."""
        self._file.close()


def _tar_member(member: tarfile.TarInfo, name: str) -> Member:
    reason = None
    if member.issparse():
        reason = "is a sparse file: pack it without tar's option -S"
    elif not member.isreg() and not member.isdir():
        reason = "is a link or a special file: pack the file itself (tar -h)"
    # Windows programs write backslashes.
    return Member(
        name.replace("\\", "/"),
        member.size if member.isreg() else 0,
        (member.offset_data, member.size),
        member.isdir(),
        reason,
    )


class SevenZipArchive(Archive):
    """A 7z archive, which is unpacked into a temporary file when it is opened."""

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        super().__init__(path)
        with _seven_zip(path) as archive:
            if archive.needs_password():
                raise UserError(f"{path} is encrypted: make the archive without a password")
            self._take(map(_seven_zip_member, archive.files), max_bytes)
            size = sum(self.sizes.values())
            if is_bomb(size, path.stat().st_size):
                raise UserError(f"{path} is a bomb: it unpacks to over 200 times its size")
            writers = _writers(_Spool(path, size))
            try:
                # Nothing is written to that folder: members become paths before they get a writer.
                files = [one.filename for one in archive.files if not one.is_directory]
                archive.extract("/", targets=files, factory=writers)
            except BaseException:
                writers.spool.file.close()
                raise
        self._file, self._slices = writers.spool.file, writers.slices

    def _open(self, handle: Any) -> BinaryIO:
        return _slice(self._file, self._slices.get(handle, (0, 0)))

    def close(self) -> None:
        """Close the archive, and delete the temporary file."""
        self._file.close()


@contextmanager
def _seven_zip(path: Path) -> Iterator[SevenZipFile]:
    """Open a 7z archive; what the library raises on a damaged one is one line.

    Raises:
        UserError: it can't be read.
    """
    from py7zr import SevenZipFile
    from py7zr.exceptions import PasswordRequired, UnsupportedCompressionMethodError

    try:
        # Given a name, the library would unpack in several threads.
        with path.open("rb") as stream, SevenZipFile(stream, "r") as archive:
            yield archive
    except PasswordRequired:
        raise UserError(f"{path} is encrypted: make the archive without a password") from None
    except UnsupportedCompressionMethodError:
        raise UserError(f"{path} is packed in a way that can't be read: use LZMA2") from None
    except (UserError, OSError):
        raise
    except Exception:  # It raises all kinds of errors on damaged data.
        raise damaged(path, "7z") from None


def _seven_zip_member(member: ArchiveFile) -> Member:
    reason = None
    if member.is_symlink or member.is_junction or member.is_socket:
        reason = "is a link or a special file: pack the file itself"
    name, size = str(member.filename), int(member.uncompressed or 0)
    return Member(name, size, str(PurePosixPath("/", name)), member.is_directory, reason)


def _writers(spool: _Spool) -> Any:
    """Return a factory of writers for py7zr, which note the slice of each member."""
    from py7zr.io import Py7zIO, WriterFactory

    class Writer(Py7zIO):
        def __init__(self, name: str) -> None:
            self.name, self.start = name, spool.size

        def write(self, s: bytes | bytearray) -> int:
            spool.write(s)
            writers.slices[self.name] = (self.start, spool.size - self.start)
            return len(s)

        def read(self, size: int | None = None) -> bytes:
            return b""

        def seek(self, offset: int, whence: int = 0) -> int:
            return 0

        def flush(self) -> None:
            pass

        def size(self) -> int:
            return spool.size - self.start

    class Writers(WriterFactory):
        def __init__(self) -> None:
            self.spool = spool
            self.slices: dict[str, _Slice] = {}

        def create(self, filename: str) -> Py7zIO:
            return Writer(filename)

    writers = Writers()
    return writers


class _Spool:
    """An unnamed temporary file that an archive is unpacked into.

    TMPDIR says in which folder it lies; without it, /var/tmp, which unlike /tmp is on a disk.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path, self.max_bytes, self.size = path, max_bytes, 0
        large = "/var/tmp"
        named = os.environ.get("TMPDIR") or not os.access(large, os.W_OK)
        self.folder = tempfile.gettempdir() if named else large
        file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        self.file = cast(BinaryIO, file)

    def write(self, data: bytes | bytearray) -> None:
        """Append to the file.

        Raises:
            UserError: the disk is full, or the archive is over the limit.
        """
        view = memoryview(data)
        self.size += len(view)
        check_size(self.path, self.size, self.max_bytes)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError as error:
            raise UserError(
                f"{self.path} can't be unpacked into {self.folder} ({error.strerror}): free some "
                "space there, or name another folder in the environment, as TMPDIR"
            ) from None


def _decompressed(path: Path, kind: str, max_bytes: int | None) -> BinaryIO:
    """Decompress a tar into a temporary file.

    Raises:
        UserError: it is damaged, no tar, or over the limit.
    """
    spool = _Spool(path, max_bytes)
    try:
        with path.open("rb") as packed, _DECOMPRESS[kind](packed) as stream:
            while data := stream.read(_CHUNK):
                if not spool.size and data[257:262] != b"ustar":
                    raise UserError(f"{path} holds no tar archive: pack a folder as tar.{kind}")
                spool.write(data)
                if is_bomb(spool.size, packed.tell()):
                    raise UserError(f"{path} is a bomb: it unpacks to over 200 times its size")
        if not spool.size:
            raise damaged(path, f"tar.{kind}")
    except BaseException as error:
        spool.file.close()
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)):
            raise damaged(path, f"tar.{kind}") from None
        if isinstance(error, OSError) and error.errno is None:  # so bz2 tells damage
            raise damaged(path, f"tar.{kind}") from None
        raise
    return spool.file


_DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
}


def _slice(file: BinaryIO, place: _Slice) -> BinaryIO:
    return cast(BinaryIO, _SliceReader(file.fileno(), *place))


class _SliceReader(io.RawIOBase):
    """Reads a part of a file, whose own position other threads may move."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._at, self._end = descriptor, start, start + size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._end - self._at
        data = os.pread(self._descriptor, left if size < 0 else min(size, left), self._at)
        if left and size and not data:
            raise EOFError("the archive has become shorter")
        self._at += len(data)
        return data


class _Headers:
    """A file that tarfile reads the headers from, and nothing as large as only a lie would be."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read some bytes of a header."""
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("a header is too long")
        return self._file.read(size)
