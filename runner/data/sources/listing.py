"""List the media of a source and their captions, without opening the media."""

from __future__ import annotations

import json
import os
import posixpath
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from runner.core.errors import UserError
from runner.core.file_identity import Identity, identity_of
from runner.data.sources.archive import check_members, member_name, open_archive, plain
from runner.formats.media_types import MediaKind, hidden, media_kind_of

# The format of the Hugging Face loaders of pictures and clips: file_name, and text or caption.
METADATA = "metadata.jsonl"

Opener = Callable[[], BinaryIO]


@dataclass(frozen=True)
class ListedMedia:
    """A media file that was listed, not opened; ``size`` is the uncompressed size of a member."""

    name: str
    media_kind: MediaKind
    caption: str | None
    open: Opener
    file: Path | None = None
    archive: Path | None = None
    member: str | None = None
    size: int = 0


@dataclass(frozen=True)
class Listing:
    """The listed media of a source.

    Attributes:
        media: the media, in the order of the listing.
        identity: of an archive, when it was listed.
        began: when an archive was listed, in nanoseconds since 1970.
    """

    media: list[ListedMedia]
    identity: Identity | None = None
    began: int = 0


@contextmanager
def open_listing(source_kind: str, path: Path, max_bytes: int) -> Iterator[Listing]:
    """List the media of a source; those of an archive can be read during the block.

    Raises:
        UserError: :func:`check_members` refuses the archive, a caption is not UTF-8, or a line of
            JSON is wrong.
    """
    if source_kind == "jsonl":
        yield Listing(_list_jsonl(path))
    elif source_kind == "zip":
        with open_archive(path) as archive:
            check_members(path, archive.infolist(), max_bytes)
            yield _list_zip(archive, path)
    else:
        files = files_of(path)
        media = _list_tree({name: _file_opener(file) for name, file in files.items()}, path)
        yield Listing([replace(listed, file=files[listed.name]) for listed in media])


def _list_zip(archive: zipfile.ZipFile, path: Path) -> Listing:
    assert archive.fp is not None
    began, identity = time.time_ns(), identity_of(os.fstat(archive.fp.fileno()))

    def reader(member: zipfile.ZipInfo) -> Opener:
        return lambda: cast(BinaryIO, archive.open(member))

    packed = [member for member in archive.infolist() if not member.is_dir()]
    members = {plain(member_name(member)): member for member in packed}
    media = _list_tree({name: reader(member) for name, member in members.items()}, path)
    media_list = [
        replace(
            listed,
            archive=path,
            member=members[listed.name].filename,
            size=members[listed.name].file_size,
        )
        for listed in media
    ]
    return Listing(media_list, identity, began)


def _file_opener(file: Path) -> Opener:
    return lambda: file.open("rb")


def _list_tree(openers: Mapping[str, Opener], where: Path) -> list[ListedMedia]:
    visible = [name for name in sorted(openers) if not hidden(name)]
    captions = {name[:-4]: name for name in visible if name.lower().endswith(".txt")}
    captions_from_metadata = _metadata(visible, openers, where)
    media_list: list[ListedMedia] = []
    for name in visible:
        kind = media_kind_of(name)
        if kind is None:
            continue
        text = captions.get(posixpath.splitext(name)[0])
        caption = captions_from_metadata.get(name)
        if text is not None:
            caption = _read(openers[text], f"{text} in {where}").strip()
        media_list.append(ListedMedia(name, kind, caption, openers[name]))
    return media_list


def _metadata(
    visible: list[str], openers: Mapping[str, Opener], where: Path
) -> dict[str, str | None]:
    """Read the captions of every metadata.jsonl, by the name of their media."""
    by_name: dict[str, str | None] = {}
    for name in visible:
        if posixpath.basename(name) != METADATA:
            continue
        folder = posixpath.dirname(name)
        for line, record in _records(
            _read(openers[name], f"{name} in {where}"), f"{where}/{name}", "file_name"
        ):
            media = record.get("file_name")
            if not isinstance(media, str):
                raise UserError(f"{line}: needs a file_name, a string")
            place = posixpath.normpath(posixpath.join(folder, media))
            if place not in openers:
                raise UserError(f"{line}: there is no {place}")
            caption = record.get("text", record.get("caption"))
            if not isinstance(caption, str | None):
                raise UserError(f"{line}: the caption (text or caption) must be a string")
            by_name[place] = None if caption is None else caption.strip()
    return by_name


def _records(text: str, where: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{where} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f'{place}: must be an object such as {{"{key}": ...}}')
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{place}: has half of a character (\\ud800 to \\udfff): write both halves"
            ) from None
        yield place, record


def _list_jsonl(path: Path) -> list[ListedMedia]:
    media_list: list[ListedMedia] = []
    for where, record in _records(_read(_file_opener(path), str(path)), str(path), "image_path"):
        keys = [key for key in ("image_path", "video_path", "path") if key in record]
        if len(keys) != 1 or not isinstance(record[keys[0]], str):
            raise UserError(f"{where}: needs one of image_path, video_path and path, a string")
        caption = record.get("caption")
        if not isinstance(caption, str | None):
            raise UserError(f"{where}: caption must be a string")
        name = Path(record[keys[0]]).as_posix()
        kind = media_kind_of(name)
        if kind is None or keys[0] not in ("path", f"{kind}_path"):
            raise UserError(f"{where}: {name} is not a file that {keys[0]} can name")
        file = path.parent / name
        if not file.is_file():
            raise UserError(f"{where}: there is no {file}")
        caption = None if caption is None else caption.strip()
        media_list.append(ListedMedia(name, kind, caption, _file_opener(file), file))
    return media_list


def files_of(folder: Path) -> dict[str, Path]:
    """Find the files below a folder by relative name, without hidden ones; enter folders once."""
    by_name: dict[str, Path] = {}
    seen: set[str] = set()
    for top, folders, names in os.walk(folder, followlinks=True):
        # Links may lead back up: do not enter a folder again.
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in names:
            file = Path(top, name)
            if not hidden(name):
                by_name[file.relative_to(folder).as_posix()] = file
    return by_name


def _read(opener: Opener, where: str) -> str:
    try:
        with opener() as stream:
            return stream.read().decode("utf-8-sig")
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{where} can't be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
