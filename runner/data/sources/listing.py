"""List the media of a source and their captions, without opening the media."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runner.core.errors import UserError
from runner.core.file_identity import Identity
from runner.core.regular_file import is_regular, open_regular
from runner.core.text import counted, named, printable
from runner.data.sources.archive import Archive
from runner.data.sources.caption_lists import captions_in, json_lines
from runner.data.sources.captions import (
    AS_WRITTEN,
    CaptionOptions,
    captions_of,
    chosen,
    several_notices,
    split_lines,
)
from runner.data.sources.kohya_folders import repeats_of_folders
from runner.data.sources.open_archive import open_archive
from runner.data.sources.texts import MAX_LIST, Opener, TextFile, read_texts
from runner.data.sources.tree import data_of, files_of
from runner.data.sources.written_paths import WrittenPaths
from runner.formats.caption_files import CAPTION_ENDINGS
from runner.formats.media_types import MediaKind, hidden, media_kind_of


@dataclass(frozen=True)
class ListedMedia:
    """A media file that was listed, not opened.

    ``size`` is the uncompressed size of a member. Each of ``more_captions`` makes another item.
    ``repeats`` are those of its folder's name.
    """

    name: str
    media_kind: MediaKind
    caption: str | None
    open: Opener
    file: Path | None = None
    archive: Path | None = None
    member: str | None = None
    size: int = 0
    more_captions: tuple[str, ...] = ()
    repeats: int = 1


@dataclass(frozen=True)
class Listing:
    """The listed media of a source.

    Attributes:
        media: the media, in the order of the listing.
        identity: of an archive, when it was listed.
        began: when an archive was listed, in nanoseconds since 1970.
        notices: what a person should know of how the source was read, one sentence each.
    """

    media: list[ListedMedia]
    identity: Identity | None = None
    began: int = 0
    notices: tuple[str, ...] = ()


@contextmanager
def open_listing(
    source_kind: str,
    path: Path,
    max_bytes: int,
    reading: CaptionOptions = AS_WRITTEN,
    outputs: Path | None = None,
) -> Iterator[Listing]:
    """List the media of a source; those of an archive can be read during the block.

    Args:
        source_kind: the source kind, from :func:`locate`.
        path: the source.
        max_bytes: the maximum uncompressed size of an archive.
        reading: how captions are read.
        outputs: the output folder of this run, which is no data.

    Raises:
        UserError: :func:`open_archive` refuses the archive, a caption can't be read or decoded, or
            a list is wrong.
    """
    if source_kind == "jsonl":
        yield _list_jsonl(path, reading)
    elif source_kind in ("zip", "archive"):
        with open_archive(path, max_bytes) as archive:
            yield _list_archive(archive, reading)
    else:
        tree = files_of(path, outputs)
        openers = {name: _file_opener(file) for name, file in tree.files.items()}
        media, notices = _list_tree(openers, path, reading)
        entries = [replace(listed, file=tree.files[listed.name]) for listed in media]
        yield Listing(entries, notices=(*tree.notices, *notices))


def _list_archive(archive: Archive, reading: CaptionOptions) -> Listing:
    names, left_out = data_of(archive.sizes)
    openers = {name: partial(archive.open, name) for name in names}
    media, notices = _list_tree(openers, archive.path, reading)
    entries = [
        replace(listed, archive=archive.path, member=listed.name, size=archive.sizes[listed.name])
        for listed in media
    ]
    told = (*archive.notices, *left_out, *notices)
    return Listing(entries, archive.identity, archive.began, told)


def _file_opener(file: Path) -> Opener:
    return lambda: open_regular(file)


def _list_tree(
    openers: Mapping[str, Opener], where: Path, reading: CaptionOptions
) -> tuple[list[ListedMedia], tuple[str, ...]]:
    """List the media of a tree of files with their captions; and what is to be noticed."""
    visible = {name: openers[name] for name in sorted(openers) if not hidden(name)}
    kinds = {name: kind for name in visible if (kind := media_kind_of(name)) is not None}
    captions = captions_of(list(kinds), visible, str(where), reading)
    repeats, notices = repeats_of_folders(kinds)
    media = [
        _listed(
            ListedMedia(
                name,
                kind,
                None,
                openers[name],
                repeats=repeats.get(posixpath.dirname(name), 1),
            ),
            captions.by_name.get(name),
        )
        for name, kind in kinds.items()
    ]
    return media, (*captions.notices, *notices)


def _listed(listed: ListedMedia, captions: tuple[str, ...] | None) -> ListedMedia:
    if not captions:
        return listed
    return replace(listed, caption=captions[0], more_captions=captions[1:])


def _list_jsonl(path: Path, reading: CaptionOptions) -> Listing:
    texts = read_texts(
        [TextFile(path.name, _file_opener(path), MAX_LIST)], str(path), reading.encoding
    )
    for why in texts.failed.values():
        raise UserError(f"{path}: {why}")
    paths = WrittenPaths(lambda written: _file_beside(path, written))
    entries: list[ListedMedia] = []
    lines: list[str] = []
    several: list[str] = []
    unread: list[str] = []
    for where, record in json_lines(texts.texts[path.name], str(path), "image_path"):
        keys = [key for key in ("image_path", "video_path", "path") if key in record]
        if len(keys) != 1 or not isinstance(record[keys[0]], str):
            raise UserError(f"{where}: needs one of image_path, video_path and path, a string")
        captions = captions_in(record.get("caption"), where)
        written = record[keys[0]]
        found = paths.resolve(written)
        name = Path(found or written).as_posix()
        kind = media_kind_of(name)
        if kind is None or keys[0] not in ("path", f"{kind}_path"):
            raise UserError(
                f"{where}: {printable(name[:200])} is not a file that {keys[0]} can name"
            )
        if written in paths.ambiguous:
            raise UserError(
                f"{where}: {printable(written[:200])} and "
                f"{printable(paths.ambiguous[written][:200])} would be the same file here"
            )
        if found is None:
            raise UserError(f"{where}: there is no {printable(str(path.parent / name)[:300])}")
        file = path.parent / name
        if len(captions) > 1:
            several.append(name)
        elif captions and len(split_lines(captions[0])) > 1:
            lines.append(name)
        listed = ListedMedia(name, kind, None, _file_opener(file), file)
        blank = ("",) if isinstance(record.get("caption"), str) else None
        if not captions and (beside := _caption_beside(file)) is not None:
            unread.append(printable(beside))
        entries.append(_listed(listed, chosen(captions, reading) if captions else blank))
    notices = (
        *texts.notices,
        *paths.notices(str(path)),
        *several_notices(lines, several, reading),
        *_unread(path, unread),
    )
    return Listing(entries, notices=notices)


def _caption_beside(media: Path) -> str | None:
    """Return the name of a text that looks like the caption of a medium without one."""
    names = [media.stem + ending for ending in CAPTION_ENDINGS]
    names += [media.name + ending for ending in CAPTION_ENDINGS]
    return next((name for name in names if is_regular(media.parent / name)), None)


def _unread(path: Path, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield (
            f"{path} has no caption for {counted(len(names), 'row')} with a text beside the medium "
            f"({named(names)}), which is not read: write it into the row, or give the folder."
        )


def _file_beside(path: Path, written: str) -> str | None:
    return written if is_regular(path.parent / written) else None
