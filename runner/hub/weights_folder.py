"""Find a model's parts in a folder of weights, such as ComfyUI's ``models``; reads headers only.

What a file is, its header says. Names decide only between files that fit the same part: the
transformers for t2v and i2v, 480p and 720p have the same tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from runner.core.errors import UserError
from runner.core.text import counted, named
from runner.formats.published_check import PART_NAMES, difference, resembles
from runner.formats.safetensors_header import read_header

# No part is smaller, even with a byte for each value; LoRAs are, and a folder has many of them.
_LEAST_BYTES = 200_000_000
_TASKS = ("t2v", "i2v")
_RESOLUTION = re.compile(r"(?<!\d)\d{3,4}p")


@dataclass(frozen=True)
class FoundWeights:
    """What a folder has of a model.

    Attributes:
        files: the file of each part that is in it.
        notices: a line on each part that is not, and on files that cannot be read.
    """

    files: Mapping[str, Path]
    notices: tuple[str, ...]


@dataclass
class _Candidates:
    """The files that fit a part, and those that nearly do, with the reason against them."""

    fitting: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)


def find_weights(folder: Path, wanted: Mapping[str, str], task: str) -> FoundWeights:
    """Find parts of the model among the safetensors files in a folder and below it.

    Args:
        folder: the folder.
        wanted: the parts to find, with the files of the hub that they would take the place of.
        task: the run's task.

    Raises:
        UserError: the folder has none of the parts, or several files for one and no name decides.
    """
    candidates = {part: _Candidates() for part in wanted}
    unreadable: list[str] = []
    paths = list(_large_files(folder))
    for path in paths:
        try:
            header = read_header(path)
        except UserError:
            unreadable.append(_short(path, folder))
            continue
        for part, of_part in candidates.items():
            wrong = difference(part, header)
            if wrong is None:
                of_part.fitting.append(path)
            elif resembles(part, header):
                of_part.refused.append((path, wrong))
    files: dict[str, Path] = {}
    for part, of_part in candidates.items():
        if chosen := _choose(part, of_part, folder, wanted[part], task):
            files[part] = chosen
    absent = [part for part in wanted if part not in files]
    passed = [
        f"{_short(path, folder)} {why}" for part in absent for path, why in candidates[part].refused
    ]
    if unreadable:
        passed.append(f"{named(unreadable)} cannot be read")
    if wanted and not files:
        raise UserError(
            f"model.folder={folder} has no file of this model among "
            f"{counted(len(paths), 'large .safetensors file')}"
            f"{': ' * bool(passed)}{'; '.join(passed)}."
        )
    notices = [f"model.folder: {line}: not used." for line in passed]
    if absent:
        names = ", ".join(f"the {PART_NAMES[part]}" for part in absent)
        notices.insert(0, f"model.folder: not in it, so from the hub: {names}.")
    return FoundWeights(files, tuple(notices))


def _large_files(folder: Path) -> Iterator[Path]:
    """Yield each safetensors file once, in the order of names; links are followed."""
    folders: set[tuple[int, int]] = set()
    seen: set[Path] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        stat = Path(place).stat()
        if (stat.st_dev, stat.st_ino) in folders:
            below.clear()
            continue
        folders.add((stat.st_dev, stat.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if path.suffix != ".safetensors" or not path.is_file() or path.resolve() in seen:
                continue
            if path.stat().st_size >= _LEAST_BYTES:
                seen.add(path.resolve())
                yield path


def _choose(
    part: str, candidates: _Candidates, folder: Path, hub_file: str, task: str
) -> Path | None:
    """Choose a part's file among those that fit; those that names speak against are refused.

    Raises:
        UserError: several are left.
    """
    fitting = candidates.fitting
    if part == "transformer":
        found = _RESOLUTION.search(hub_file)
        said = [task, *([found[0]] if found else [])]
        against = {path: _against(_short(path, folder), *said) for path in fitting}
        candidates.refused += [(path, why) for path, why in against.items() if why]
        fitting = [path for path, why in against.items() if not why]
        marks = {
            path: sum(word in _short(path, folder).lower() for word in said) for path in fitting
        }
    else:
        marks = {path: int(path.name == PurePosixPath(hub_file).name) for path in fitting}
    fitting = [path for path in fitting if marks[path] == max(marks.values())]
    if len(fitting) > 1:
        raise UserError(
            f"model.folder={folder} has {len(fitting)} files for the {PART_NAMES[part]}: "
            f"{', '.join(_short(path, folder) for path in fitting)}. Choose one, for example "
            f"model.{part}={fitting[0]}."
        )
    return fitting[0] if fitting else None


def _against(name: str, task: str, resolution: str | None = None) -> str | None:
    """Say why a transformer of this name is not the run's, or None."""
    name = name.lower()
    tasks = [word for word in _TASKS if word in name]
    if tasks and task not in tasks:
        return f"is for {tasks[0]} by its name"
    sizes = _RESOLUTION.findall(name)
    if resolution and sizes and resolution not in sizes:
        return f"is for {sizes[0]} by its name"
    return "is a distilled transformer by its name" if "distil" in name else None


def _short(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
