"""Find out which kind of source a path is."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from runner.config.dataset_schema import SOURCE_KINDS
from runner.core.errors import UserError
from runner.core.text import printable
from runner.data.sources.open_archive import archive_kind
from runner.data.sources.tree import files_of
from runner.data.sources.zip_archive import open_zip
from runner.formats.media_types import hidden, is_archive, media_kind_of

# Datasets of the hub are downloaded first, and then located as one of the other kinds.
KINDS = tuple(kind for kind in SOURCE_KINDS if kind != "hub")
_ARCHIVE = ("archive", "zip")
_GIVE = "a .zip, .tar, .tar.gz or .7z, a .jsonl or a folder"
SAMPLE = Path(__file__).resolve().parents[1] / "sample"


def locate(
    path: str, kind: str = "auto", *, cwd: Path, outputs: Path | None = None
) -> tuple[str, Path]:
    """Locate a source and detect its kind.

    Args:
        path: as the user typed it; ``~`` is expanded.
        kind: its kind; "auto" detects an archive, a .jsonl, a folder with media, or a folder with
            nothing but one archive or .jsonl. "zip" is an older word for "archive".
        cwd: the folder that a relative path starts at.
        outputs: the output folder of this run, which is no data.

    Returns:
        The kind, "zip" or "archive" for archives of either form, and the absolute path.

    Raises:
        UserError: there is no such source, more than one, or one of another kind.
    """
    if kind not in KINDS:
        raise UserError(f"dataset kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if kind == "sample":
        return "sample", SAMPLE
    if printable(path) != path:
        raise UserError(f"dataset.path={printable(path)}: the name is not UTF-8: rename it")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:  # "~name" of an unknown user may still be a file.
        expanded = Path(path)
    target = Path(os.path.normpath(cwd / expanded))
    try:
        if not target.exists():
            raise UserError(_missing(path, target))
        located = (
            _in_folder(path, target, kind, outputs)
            if target.is_dir()
            else _kind_of_file(target, kind)
        )
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    if located[0] != "archive":
        return located
    if archive_kind(located[1]) != "zip":
        return located
    open_zip(located[1]).close()
    return "zip", located[1]


def _kind_of_file(file: Path, kind: str) -> tuple[str, Path]:
    if not file.is_file():
        raise UserError(f"{file} is not a regular file: give {_GIVE}")
    if kind == "folder":
        raise UserError(f"{file} is a file, and dataset=folder needs a folder")
    if kind in _ARCHIVE:
        return "archive", file
    if kind == "jsonl" or file.suffix.lower() == ".jsonl":
        return "jsonl", file
    if not is_archive(file.name):
        # It may be one of another kind, which is named then.
        archive_kind(file)
        raise UserError(f"{file} is not a source of media: give {_GIVE}")
    return "archive", file


def _in_folder(path: str, folder: Path, kind: str, outputs: Path | None) -> tuple[str, Path]:
    if kind == "folder":
        return "folder", folder
    visible = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    archives = [p for p in visible if is_archive(p.name)]
    lists = [p for p in visible if p.suffix.lower() == ".jsonl"]
    if kind == "auto":
        return _kind_of_folder(path, folder, archives, lists, outputs)
    what, found = ("archive", archives) if kind in _ARCHIVE else ("jsonl", lists)
    if len(found) == 1:
        return what, found[0]
    names = ", ".join(p.name for p in found) or "none"
    file = "archive" if what == "archive" else ".jsonl file"
    raise UserError(f"{path} must hold one {file} for dataset={kind}; it holds {names}")


def _kind_of_folder(
    path: str, folder: Path, archives: list[Path], lists: list[Path], outputs: Path | None
) -> tuple[str, Path]:
    """Return the folder if it has media and no archive, else its only archive or list."""
    tree = files_of(folder, outputs)
    names = (name for name in sorted(tree.files) if not hidden(name))
    media = next((name for name in names if media_kind_of(name)), None)
    if not archives:
        if media is not None:
            return "folder", folder
        if len(lists) == 1:
            return "jsonl", lists[0]
        nothing = "holds no archive and no picture or clip: put some there, or set dataset.path"
        raise UserError(printable(". ".join([f"{path} {nothing}", *tree.notices])))
    if media is None and len(archives) == 1:
        return "archive", archives[0]
    also = f" and media such as {media}" if media is not None else ""
    held = ", ".join(p.name for p in archives)
    raise UserError(
        printable(
            f"{path} holds {held}{also}: say which with dataset.path={path.rstrip('/')}/<name>"
        )
    )


def _missing(path: str, target: Path) -> str:
    # The mistake is in the first part of the path that is missing.
    wrong = target
    while not wrong.parent.exists():
        wrong = wrong.parent
    try:
        names = [file.name for file in wrong.parent.iterdir()]
    except OSError:
        names = []
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wrong.name.lower(), lower, 1)
    if close:
        hint = f"; did you mean {wrong.parent / lower[close[0]]}?"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        hint = (
            ": set dataset.path. A dataset of the Hugging Face hub is taken with "
            f"python -m runner dataset=hub dataset.path={path}"
        )
    else:
        hint = ": set dataset.path"
    return f"{path}: there is no {target}{hint}"
