"""List the media of a source and their captions, without opening the media."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from runner.core.errors import UserError
from runner.core.file_identity import Identity
from runner.data.sources.archive import READ_ERRORS, Archive
from runner.data.sources.open_archive import open_archive
from runner.data.sources.tree import data_of, files_of
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
        entries: the media.
        identity: of an archive, when it was listed.
        began: when an archive was listed, in nanoseconds since 1970.
        notices: what a person should know of how the source was read, one sentence each.
    """

    entries: list[ListedMedia]
    identity: Identity | None = None
    began: int = 0
    notices: tuple[str, ...] = ()


@contextmanager
def open_listing(
    source_kind: str, path: Path, max_bytes: int, outputs: Path | None = None
) -> Iterator[Listing]:
    """List the media of a source; those of an archive can be read during the block.

    Args:
        source_kind: from :func:`locate`, as ``path`` is.
        path: the source.
        max_bytes: the maximum uncompressed size of an archive.
        outputs: the output folder of this run, which is no data.

    Raises:
        UserError: :func:`open_archive` refuses the archive, a caption is not UTF-8, or a line of
            JSON is wrong.
    """
    if source_kind == "jsonl":
        yield Listing(_list_jsonl(path))
    elif source_kind in ("zip", "archive"):
        with open_archive(path, max_bytes) as archive:
            yield _list_archive(archive)
    else:
        tree = files_of(path, outputs)
        media = _list_tree({name: _file_opener(file) for name, file in tree.files.items()}, path)
        yield Listing(
            [replace(listed, file=tree.files[listed.name]) for listed in media],
            notices=tree.notices,
        )


def _list_archive(archive: Archive) -> Listing:
    names, notices = data_of(archive.sizes)
    media = _list_tree({name: partial(archive.open, name) for name in names}, archive.path)
    entries = [
        replace(listed, archive=archive.path, member=listed.name, size=archive.sizes[listed.name])
        for listed in media
    ]
    return Listing(entries, archive.identity, archive.began, (*archive.notices, *notices))


def _file_opener(file: Path) -> Opener:
    return lambda: file.open("rb")


def _list_tree(openers: Mapping[str, Opener], where: Path) -> list[ListedMedia]:
    visible = [name for name in sorted(openers) if not hidden(name)]
    captions = {name[:-4]: name for name in visible if name.lower().endswith(".txt")}
    captions_from_metadata = _metadata(visible, openers, where)
    entries: list[ListedMedia] = []
    for name in visible:
        kind = media_kind_of(name)
        if kind is None:
            continue
        text = captions.get(posixpath.splitext(name)[0])
        caption = captions_from_metadata.get(name)
        if text is not None:
            caption = _read(openers[text], f"{text} in {where}").strip()
        entries.append(ListedMedia(name, kind, caption, openers[name]))
    return entries


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
    entries: list[ListedMedia] = []
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
        entries.append(ListedMedia(name, kind, caption, _file_opener(file), file))
    return entries


def _read(opener: Opener, where: str) -> str:
    try:
        with opener() as stream:
            return stream.read().decode("utf-8-sig")
    except READ_ERRORS as error:
        raise UserError(f"{where} can't be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
