"""Where media come from: a zip archive, a folder, a JSONL file, or the sample of the runner.

Nothing here trusts an archive: `check_archive` looks at all of it before anything is written.
PIL and PyAV are imported where they are used, so that importing this module is quick.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, Literal, cast

from runner.archive import check_archive, member_name, open_archive
from runner.atomic import whole
from runner.errors import UserError
from runner.formats.bucket import Size
from runner.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, probe_image, probe_video, to_rgb

Kind = Literal["zip", "folder", "jsonl", "sample"]
MediaKind = Literal["image", "video"]
Progress = Callable[[int, int], None]

KINDS = ("auto", "zip", "folder", "jsonl", "sample")
SAMPLE = Path(__file__).resolve().parent / "sample"

__all__ = ("Item", "Scan", "check_archive", "locate", "scan", "write_media")

_CHUNK = 1 << 20
# Clips in an archive are unpacked to be probed: up to this size in memory, else to the temporary
# folder of the system.
_IN_MEMORY = 64 << 20


@dataclass(frozen=True)
class Item:
    """One picture or clip, with its caption.

    name: path inside its source, forward slashes. sha256: hex digest of the media's bytes.
    size: width and height in pixels, as stored. frames: those that can be decoded, 1 for a picture.
    fps: of a clip, if it says. mode: PIL's mode of a picture. caption: None when there is none.
    The bytes lie in `file`, or in `member` of `archive`.
    """

    name: str
    kind: MediaKind
    sha256: str
    bytes: int
    size: Size
    frames: int
    fps: float | None
    mode: str | None
    caption: str | None
    file: Path | None
    archive: Path | None
    member: str | None


@dataclass(frozen=True)
class Scan:
    """What a source holds: items sorted by name, and media left out as (name, why)."""

    kind: Kind
    path: Path
    items: tuple[Item, ...]
    ignored: tuple[tuple[str, str], ...]


def locate(path: str, kind: str = "auto", *, cwd: Path) -> tuple[str, Path]:
    """Which kind of source `path` (from `cwd`, `~` expanded) is, and where: absolute.

    "auto" is told from the path: a .zip, a .jsonl, a folder with media, or a folder with nothing
    but one of the former. Raises UserError when there is nothing, too much, or the wrong thing.
    """
    if kind not in KINDS:
        raise UserError(f"dataset kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if kind == "sample":
        return "sample", SAMPLE
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:  # "~name" of nobody known here may still be a file.
        expanded = Path(path)
    target = Path(os.path.normpath(cwd / expanded))
    if not target.exists():
        raise UserError(_missing(path, target))
    found = _locate_in_folder(path, target, kind) if target.is_dir() else _told(target, kind)
    if found[0] == "zip":
        open_archive(found[1]).close()
    return found


def _told(file: Path, kind: str) -> tuple[str, Path]:
    told = {".zip": "zip", ".jsonl": "jsonl"}.get(file.suffix.lower())
    if kind == "folder":
        raise UserError(f"{file} is a file, and dataset=folder needs a folder")
    if kind == "auto" and told is None:
        raise UserError(f"{file} is no source of media: give a .zip, a .jsonl or a folder")
    return (told if told is not None and kind == "auto" else kind), file


def _locate_in_folder(path: str, folder: Path, kind: str) -> tuple[str, Path]:
    if kind == "folder":
        return "folder", folder
    shown = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    of_kind = {k: [p for p in shown if p.suffix.lower() == f".{k}"] for k in ("zip", "jsonl")}
    if kind != "auto":
        if len(of_kind[kind]) == 1:
            return kind, of_kind[kind][0]
        names = ", ".join(p.name for p in of_kind[kind]) or "none"
        raise UserError(f"{path} must hold one .{kind} file for dataset={kind}; it holds {names}")
    archives = of_kind["zip"]
    media = next((name for name in sorted(_files(folder)) if _media_kind(name)), None)
    if media is None and not archives and len(of_kind["jsonl"]) == 1:
        return "jsonl", of_kind["jsonl"][0]
    if media is None and len(archives) == 1:
        return "zip", archives[0]
    if media is not None and not archives:
        return "folder", folder
    if not archives:
        raise UserError(
            f"{path} holds no zip and no picture or clip: put some there, or set dataset.path"
        )
    also = f" and media such as {media}" if media is not None else ""
    names = ", ".join(p.name for p in archives)
    raise UserError(f"{path} holds {names}{also}: say which with dataset.path={path}/<name>")


def _missing(path: str, target: Path) -> str:
    # The first part of the path that is missing is where the slip is.
    wrong = target
    while not wrong.parent.exists():
        wrong = wrong.parent
    try:
        names = [file.name for file in wrong.parent.iterdir()]
    except OSError:
        names = []
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wrong.name.lower(), lower, 1)
    hint = f"; did you mean {wrong.parent / lower[close[0]]}?" if close else ": set dataset.path"
    return f"{path}: there is no {target}{hint}"


def scan(kind: str, path: Path, *, max_bytes: int, progress: Progress | None = None) -> Scan:
    """Look at every medium of a source, as `locate` gave it. Reads only; writes nothing.

    max_bytes: the most an archive may hold unpacked. progress: called with (done, all).
    Raises UserError for an archive that `check_archive` refuses, a caption that is not UTF-8,
    a wrong JSONL line, and a source without one readable medium.
    """
    items: list[Item] = []
    ignored: list[tuple[str, str]] = []
    with _entries(kind, path, max_bytes) as entries:
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            found = pool.map(_look, entries)
            for done, (entry, result) in enumerate(zip(entries, found, strict=True), 1):
                if isinstance(result, Item):
                    items.append(result)
                else:
                    ignored.append((entry.name, result))
                if progress is not None:
                    progress(done, len(entries))
        finally:
            # An interrupt must not wait for the rest of a large source.
            pool.shutdown(cancel_futures=True)
    if not items:
        why = f"; {ignored[0][0]}: {ignored[0][1]}" if ignored else ""
        raise UserError(f"{path} holds no picture or clip that can be read{why}")
    items.sort(key=lambda item: item.name)
    return Scan(cast(Kind, kind), path, tuple(items), tuple(sorted(ignored)))


@dataclass(frozen=True)
class _Entry:
    """A medium that is yet to be looked at."""

    name: str
    kind: MediaKind
    caption: str | None
    open: Callable[[], BinaryIO]
    file: Path | None = None
    archive: Path | None = None
    member: str | None = None


@contextmanager
def _entries(kind: str, path: Path, max_bytes: int) -> Iterator[list[_Entry]]:
    if kind == "jsonl":
        yield _jsonl_entries(path)
    elif kind == "zip":
        check_archive(path, max_bytes)
        with open_archive(path) as archive:
            packed = [member for member in archive.infolist() if not member.is_dir()]
            members = {str(PurePosixPath(member_name(member))): member for member in packed}

            def reader(member: zipfile.ZipInfo) -> Callable[[], BinaryIO]:
                return lambda: cast(BinaryIO, archive.open(member))

            found = _tree_entries({name: reader(member) for name, member in members.items()}, path)
            yield [replace(e, archive=path, member=members[e.name].filename) for e in found]
    else:
        files = _files(path)
        openers = {name: _file_opener(file) for name, file in files.items()}
        yield [replace(entry, file=files[entry.name]) for entry in _tree_entries(openers, path)]


def _file_opener(file: Path) -> Callable[[], BinaryIO]:
    return lambda: file.open("rb")


def _tree_entries(openers: Mapping[str, Callable[[], BinaryIO]], where: Path) -> list[_Entry]:
    visible = [name for name in sorted(openers) if not _hidden(name)]
    captions = {name[:-4]: name for name in visible if name.lower().endswith(".txt")}
    entries: list[_Entry] = []
    for name in visible:
        kind = _media_kind(name)
        if kind is None:
            continue
        text = captions.get(str(PurePosixPath(name).with_suffix("")))
        caption = None
        if text is not None:
            caption = _read(openers[text], f"{text} in {where}").strip()
        entries.append(_Entry(name, kind, caption, openers[name]))
    return entries


def _jsonl_entries(path: Path) -> list[_Entry]:
    entries: list[_Entry] = []
    for number, line in enumerate(_read(_file_opener(path), str(path)).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f'{where}: must be an object such as {{"image_path": ...}}')
        keys = [key for key in ("image_path", "video_path", "path") if key in record]
        if len(keys) != 1 or not isinstance(record[keys[0]], str):
            raise UserError(f"{where}: needs one of image_path, video_path and path, a string")
        caption = record.get("caption")
        if not isinstance(caption, str | None):
            raise UserError(f"{where}: caption must be a string")
        name = Path(record[keys[0]]).as_posix()
        kind = _media_kind(name)
        if kind is None or keys[0] not in ("path", f"{kind}_path"):
            raise UserError(f"{where}: {name} is not a file that {keys[0]} can name")
        file = path.parent / name
        if not file.is_file():
            raise UserError(f"{where}: there is no {file}")
        caption = None if caption is None else caption.strip()
        entries.append(_Entry(name, kind, caption, _file_opener(file), file))
    return entries


def _files(folder: Path) -> dict[str, Path]:
    """Files of a folder and those in it by name, hidden ones left out; each folder once."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for top, folders, names in os.walk(folder, followlinks=True):
        # Links may lead back up: a folder met before is not entered again.
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in names:
            file = Path(top, name)
            if not _hidden(name):
                found[file.relative_to(folder).as_posix()] = file
    return found


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _media_kind(name: str) -> MediaKind | None:
    extension = PurePosixPath(name).suffix.lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None


def _read(opener: Callable[[], BinaryIO], where: str) -> str:
    try:
        with opener() as stream:
            return stream.read().decode("utf-8-sig")
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{where} can't be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _look(entry: _Entry) -> Item | str:
    """The item, or why it is left out."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "its file name is not UTF-8: rename it"
    if entry.file is not None and not entry.file.is_file():
        return "can't be read: it is a broken link or no regular file"
    try:
        with entry.open() as stream:
            if entry.kind == "image":
                data = stream.read()
                digest, length = hashlib.sha256(data).hexdigest(), len(data)
                size, mode = probe_image(io.BytesIO(data))
                frames, fps = 1, None
            else:
                mode = None
                with cast(BinaryIO, SpooledTemporaryFile(_IN_MEMORY)) as spool:
                    # A clip in a folder can be read again where it lies.
                    copy = None if entry.file else spool
                    digest, length = _hash(stream, copy)
                    size, frames, fps = probe_video(entry.file or spool)
    except Exception as error:
        # Decoders raise all kinds of errors on damaged data, and one bad file must not end a scan.
        if type(error).__name__ == "UnidentifiedImageError":
            return "can't be read: it is no picture"
        return f"can't be read: {getattr(error, 'strerror', None) or error or type(error).__name__}"
    return Item(
        name=entry.name,
        kind=entry.kind,
        sha256=digest,
        bytes=length,
        size=size,
        frames=frames,
        fps=fps,
        mode=mode,
        caption=entry.caption,
        file=entry.file,
        archive=entry.archive,
        member=entry.member,
    )


def _hash(source: BinaryIO, copy: BinaryIO | None) -> tuple[str, int]:
    digest, length = hashlib.sha256(), 0
    while data := source.read(_CHUNK):
        digest.update(data)
        length += len(data)
        if copy is not None:
            copy.write(data)
    return digest.hexdigest(), length


def write_media(item: Item, destination: Path, *, as_rgb: bool = False) -> None:
    """Copy an item's bytes to `destination`, whole or not at all, checking its sha256.

    as_rgb: write a picture as an RGB PNG instead (musubi crashes on RGBA).
    Raises UserError when the source has changed since the scan or can't be read.
    """
    with (
        whole(destination) as temporary,
        _open_item(item) as source,
        temporary.open("wb") as out,
    ):
        held = io.BytesIO() if as_rgb else out
        digest, _ = _hash(source, cast(BinaryIO, held))
        if digest != item.sha256:
            raise UserError(f"{item.name} has changed since it was looked at: start again")
        if as_rgb:
            from PIL import Image

            with Image.open(cast(BinaryIO, held)) as image:
                to_rgb(image).save(out, "PNG")


@contextmanager
def _open_item(item: Item) -> Iterator[BinaryIO]:
    if item.file is not None:
        try:
            stream = item.file.open("rb")
        except OSError as error:
            raise UserError(f"{item.file} can't be read: {error.strerror}") from None
        with stream:
            yield stream
        return
    if item.archive is None or item.member is None:
        raise ValueError(f"item {item.name!r} has no source")
    with open_archive(item.archive) as archive:
        try:
            with archive.open(item.member) as member:
                yield cast(BinaryIO, member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{item.name} in {item.archive} can't be read: {error}") from None
