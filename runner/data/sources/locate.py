"""Find out which kind of source a path is."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from runner.config.schema import SOURCE_KINDS
from runner.core.errors import UserError
from runner.data.sources.archive import open_archive
from runner.data.sources.listing import files_of
from runner.formats.media_types import media_kind_of

# Datasets of the hub are downloaded first, and then located as one of the other kinds.
KINDS = tuple(kind for kind in SOURCE_KINDS if kind != "hub")
SAMPLE = Path(__file__).resolve().parents[1] / "sample"


def locate(path: str, kind: str = "auto", *, cwd: Path) -> tuple[str, Path]:
    """Locate a source and detect its kind.

    Args:
        path: as the user typed it; ``~`` is expanded.
        kind: its kind; "auto" detects a .zip, a .jsonl, a folder with media, or a folder with
            nothing but one .zip or .jsonl.
        cwd: the folder that a relative path starts at.

    Returns:
        The kind and the absolute path.

    Raises:
        UserError: there is no such source, more than one, or one of another kind.
    """
    if kind not in KINDS:
        raise UserError(f"dataset kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if kind == "sample":
        return "sample", SAMPLE
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:  # "~name" of an unknown user may still be a file.
        expanded = Path(path)
    target = Path(os.path.normpath(cwd / expanded))
    if not target.exists():
        raise UserError(_missing(path, target))
    located = _in_folder(path, target, kind) if target.is_dir() else _kind_of_file(target, kind)
    if located[0] == "zip":
        open_archive(located[1]).close()
    return located


def _kind_of_file(file: Path, kind: str) -> tuple[str, Path]:
    kind_by_suffix = {".zip": "zip", ".jsonl": "jsonl"}.get(file.suffix.lower())
    if kind == "folder":
        raise UserError(f"{file} is a file, and dataset=folder needs a folder")
    if kind == "auto" and kind_by_suffix is None:
        raise UserError(f"{file} is not a source of media: give a .zip, a .jsonl or a folder")
    return (kind_by_suffix if kind_by_suffix is not None and kind == "auto" else kind), file


def _in_folder(path: str, folder: Path, kind: str) -> tuple[str, Path]:
    if kind == "folder":
        return "folder", folder
    visible = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    of_kind = {k: [p for p in visible if p.suffix.lower() == f".{k}"] for k in ("zip", "jsonl")}
    if kind == "auto":
        return _kind_of_folder(path, folder, of_kind["zip"], of_kind["jsonl"])
    if len(of_kind[kind]) == 1:
        return kind, of_kind[kind][0]
    names = ", ".join(p.name for p in of_kind[kind]) or "none"
    raise UserError(f"{path} must hold one .{kind} file for dataset={kind}; it holds {names}")


def _kind_of_folder(
    path: str, folder: Path, archives: list[Path], lists: list[Path]
) -> tuple[str, Path]:
    """Return the folder if it has media and no archive, else its only archive or list."""
    media = next((name for name in sorted(files_of(folder)) if media_kind_of(name)), None)
    if not archives:
        if media is not None:
            return "folder", folder
        if len(lists) == 1:
            return "jsonl", lists[0]
        raise UserError(
            f"{path} holds no zip and no picture or clip: put some there, or set dataset.path"
        )
    if media is None and len(archives) == 1:
        return "zip", archives[0]
    also = f" and media such as {media}" if media is not None else ""
    names = ", ".join(p.name for p in archives)
    raise UserError(f"{path} holds {names}{also}: say which with dataset.path={path}/<name>")


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
