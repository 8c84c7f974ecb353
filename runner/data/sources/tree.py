"""The files of a folder or an archive that are data: without the outputs of runners."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.core.errors import UserError
from runner.core.text import named
from runner.formats.caption_files import TEXT_ENDINGS
from runner.formats.media_types import left_over, media_kind_of

# The files that each run's folder, the shared cache and the store of runs have.
_RUN = frozenset({"run.json", "commands.sh"})
_CACHE_LOCK = "cache/cache.lock"
_STORE = "mlflow.db"
# The folders in an output folder.
_PARTS = ("cache", "runs", "sweeps", "mlartifacts")


@dataclass(frozen=True)
class Tree:
    """The files below a folder.

    Attributes:
        files: by their relative names, with forward slashes; also media and texts that are not
            regular files.
        notices: one for each kind of thing that is not used.
    """

    files: dict[str, Path]
    notices: tuple[str, ...]


def files_of(folder: Path, outputs: Path | None = None) -> Tree:
    """Find the files below a folder; links are followed, and each folder is entered once.

    Args:
        folder: the folder.
        outputs: the output folder of this run, which is not entered.

    Raises:
        UserError: the folder can't be listed.
    """
    walk = _Walk(folder, os.path.realpath(outputs) if outputs is not None else None)
    files = dict(walk.files())
    untaken: list[str] = []
    if walk.closed:
        untaken.append(f"Left out, because it can't be read: {_some(walk.closed)}.")
    if walk.special:
        untaken.append(f"Left out, being no regular files: {_some(walk.special)}.")
    names, notices = data_of(files, walk.outputs)
    return Tree({name: files[name] for name in names}, (*untaken, *notices))


def data_of(names: Collection[str], outputs: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Tell what may be data from the other files of a folder or an archive; pure.

    Args:
        names: all files, with forward slashes.
        outputs: folders of outputs that were not looked into.

    Returns:
        The names that are not the output of runs, and what to tell of the rest.
    """
    kept, made = without_outputs(names)
    notices = []
    if made or outputs:
        notices.append(f"Left out, being the output of this program: {_some([*outputs, *made])}.")
    if over := left_over(kept):
        notices.append(over)
    return kept, notices


class _Walk:
    """A walk through folders, and what it could not take."""

    def __init__(self, top: Path, outputs: str | None) -> None:
        self.top, self._outputs = top, outputs
        self.closed: list[str] = []
        self.special: list[str] = []
        self.outputs: list[str] = []

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield the relative names and paths of all files."""
        seen: set[str] = set()
        folders = [(self.top, "")]
        while folders:
            folder, prefix = folders.pop()
            # Links may lead back up.
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            if real == self._outputs and prefix:
                self.outputs.append(prefix)
                continue
            inside: list[tuple[Path, str]] = []
            for entry in self._entries(folder, prefix):
                name = prefix + entry.name
                try:
                    if entry.is_dir():
                        # Git keeps thousands of files there, and none is meant.
                        if entry.name != ".git":
                            inside.append((Path(entry.path), name + "/"))
                    elif _is_wanted(name) or entry.is_file():
                        yield name, Path(entry.path)
                    else:
                        self.special.append(name)
                except OSError as error:
                    self.closed.append(f"{name} ({error.strerror})")
            folders.extend(reversed(inside))

    def _entries(self, folder: Path, prefix: str) -> list[os.DirEntry[str]]:
        try:
            # Of a folder that may be listed but not entered, no file can be read.
            if not os.access(folder, os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise UserError(f"{folder} can't be listed: {error.strerror}") from None
            self.closed.append(f"{prefix} ({error.strerror})")
            return []


def _is_wanted(name: str) -> bool:
    """Return whether somebody names the file if it can't be read."""
    return media_kind_of(name) is not None or name.lower().endswith(TEXT_ENDINGS)


def without_outputs(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Tell data from what runs of this program wrote into the same place; pure.

    An output folder is known by the lock of its cache or its database, and has known folders, which
    are left out; a run's folder is known by its record and its commands.

    Args:
        names: all files of a folder or archive, with forward slashes.

    Returns:
        The names that are data, and the folders that are not, each with a slash at its end.
    """
    by_folder: dict[str, set[str]] = {}
    made: set[str] = set()
    for name in names:
        folder, base = posixpath.split(name)
        if base in _RUN:
            by_folder.setdefault(f"{folder}/", set()).add(base)
        elif base == _STORE or f"/{name}".endswith(f"/{_CACHE_LOCK}"):
            root = name.removesuffix(_STORE).removesuffix(_CACHE_LOCK)
            made |= {f"{root}{part}/" for part in _PARTS}
    made |= {folder for folder, found in by_folder.items() if found == _RUN and folder != "/"}
    outer: list[str] = []
    for folder in sorted(made):
        if not outer or not folder.startswith(outer[-1]):
            outer.append(folder)
    kept = [name for name in names if not name.startswith(tuple(outer))]
    there = [folder for folder in outer if any(name.startswith(folder) for name in names)]
    return kept, there


def _some(names: Collection[str]) -> str:
    return named(sorted(names), 3)
