"""What the shared cache holds, whose it is, and what of it can go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.core.errors import UserError
from runner.core.text import did_you_mean
from runner.storage.leases import Lease, Leases
from runner.storage.shared_cache import NAMESPACES, note_of, scan

# Scraps younger than this may belong to a process that is writing them.
_SCRAP_SECONDS = 3600.0
# Deleting holds back runs that start, so it is done so many files at a time.
_BATCH = 200
# Besides who uses what: media on their way in, whose own lock clears them, and which datasets of
# the hub are whole, without which they could not be used offline.
_NOT_ENTRIES = ("claims", "uses", "incoming", "hub")
# What is known of the hub's weights, on the shelf of the tiny model's.
CHECKED = "checked"
# What belongs to no dataset: as no record names it, or as runs say nothing of its shelf.
UNKNOWN, OTHER = "(unknown)", "(other)"


@dataclass(frozen=True)
class CacheObject:
    """One thing in the cache: an entry with its note, a folder of weights, or a scrap.

    name: ``shelf/name``. used: when it was last used or made, seconds since 1970. datasets: the
    keys of those whose runs have used it. named: whether runs say what they use of its shelf.
    """

    name: str
    namespace: str
    path: Path
    bytes: int
    used: float
    datasets: frozenset[str]
    in_use: bool
    named: bool


@dataclass(frozen=True)
class CacheContents:
    """All of a cache. ``datasets`` has a short name for each key; ``running`` are runs at work.

    ``used`` is when a run last used each dataset, by its short name.
    """

    kept: tuple[CacheObject, ...]
    datasets: dict[str, str]
    used: dict[str, float]
    running: tuple[Lease, ...]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.kept)


@dataclass(frozen=True)
class PruneCriteria:
    """What to delete: what fits all that is set. older_than in seconds, keep_below in bytes."""

    older_than: float | None = None
    keep_below: int | None = None
    dataset: str | None = None
    unused: bool = False


def take_stock(root: Path, now: float) -> CacheContents:
    """Look through the cache at ``root``; writes nothing. Raises UserError if there is none."""
    if not root.is_dir():
        raise UserError(f"there is no cache at {root} yet: train once, or give --outputs")
    leases = Leases(root)
    uses, claims = leases.uses.all(), leases.claims.all()
    last: dict[str, float] = {}
    owners: dict[str, set[str]] = {}
    paths: dict[str, str] = {}
    of_dataset: dict[str, float] = {}
    for record in uses:
        key = _key(record, paths)
        of_dataset[key] = max(of_dataset.get(key, 0.0), _time(record))
        for name in record.names:
            last[name] = max(last.get(name, 0.0), _time(record))
            owners.setdefault(name, set()).add(key)
    held = frozenset().union(*(one.names for one in (*uses, *claims) if one.alive))
    kept: list[CacheObject] = []
    for namespace in scan(root):
        if not namespace.is_dir(follow_symlinks=False) or namespace.name in _NOT_ENTRIES:
            continue
        for name, path, size, made in _scan_namespace(Path(namespace.path), now):
            full_key = f"{namespace.name}/{name}"
            kept.append(
                CacheObject(
                    full_key,
                    namespace.name,
                    path,
                    size,
                    max(made, last.get(full_key, 0.0)),
                    frozenset(owners.get(full_key, ())),
                    full_key in held,
                    namespace.name in NAMESPACES
                    or (namespace.name == "weights" and name != CHECKED),
                )
            )
    running = tuple(one for one in (*uses, *claims) if one.alive)
    short = _short(paths)
    used = {short[key]: time for key, time in of_dataset.items()}
    return CacheContents(tuple(kept), short, used, running)


def _time(record: Lease) -> float:
    time = record.data.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


def _key(record: Lease, paths: dict[str, str]) -> str:
    """What tells a record's dataset from others; ``paths`` gets its short name."""
    dataset = record.data.get("dataset")
    dataset = dataset if isinstance(dataset, dict) else {}
    name = str(dataset.get("name", "unnamed"))
    found = dataset.get("paths")
    key = " + ".join(map(str, found)) if isinstance(found, list) and found else name
    paths[key] = name
    return key


def _short(paths: dict[str, str]) -> dict[str, str]:
    """The short name of each dataset where it is the only one of that name, else its path."""
    names = list(paths.values())
    return {key: name if names.count(name) == 1 else key for key, name in paths.items()}


def _scan_namespace(namespace: Path, now: float) -> Iterator[tuple[str, Path, int, float]]:
    """Name, place, bytes and time of change of all that lies on a shelf."""
    if namespace.name == "weights":
        # The files of a model are of use together only.
        for one in scan(namespace):
            size, made = _measure(Path(one.path))
            if not one.name.startswith(".") or now - made > _SCRAP_SECONDS:
                yield one.name, Path(one.path), size, made
        return
    for file, size, made in _files(namespace):
        scrap = file.name.startswith(".")
        if namespace.name in NAMESPACES and not scrap:
            note = note_of(file)
            if file.name.endswith(".json"):
                # Counted with its entry; without one it is a scrap.
                scrap = not file.with_name(file.name.removesuffix(".json")).exists()
                if not scrap:
                    continue
            with suppress(OSError):
                size += note.stat().st_size
        if not scrap or now - made > _SCRAP_SECONDS:
            yield file.name, file, size, made


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    for one in scan(folder):
        try:
            if one.is_dir(follow_symlinks=False):
                yield from _files(Path(one.path))
            else:
                stat = one.stat(follow_symlinks=False)
                yield Path(one.path), stat.st_size, stat.st_mtime
        except OSError:  # It went meanwhile.
            continue


def _measure(path: Path) -> tuple[int, float]:
    """Bytes of a file or folder, and its newest time of change."""
    files = list(_files(path)) if path.is_dir() else []
    with suppress(OSError):
        stat = path.stat(follow_symlinks=False)
        files.append((path, 0 if path.is_dir() else stat.st_size, stat.st_mtime))
    return sum(size for _, size, _ in files), max((made for _, _, made in files), default=0.0)


def dataset_key(contents: CacheContents, wanted: str) -> str:
    """The dataset of that name or path. Raises UserError with the nearest name for a wrong one."""
    for key, name in contents.datasets.items():
        if wanted in (key, name) or os.path.normpath(Path(wanted).absolute()) == key:
            return key
    if not contents.datasets:
        raise UserError(f"--dataset {wanted}: no run has said what it uses yet")
    raise UserError(
        f"--dataset {wanted}: nothing in the cache is of it."
        f"{did_you_mean(wanted, contents.datasets.values())}"
    )


def chosen(contents: CacheContents, criteria: PruneCriteria, now: float) -> list[CacheObject]:
    """What to delete, least recently used first: never what a living process uses or makes.

    What another dataset uses too stays when one dataset is to go. Shelves that runs say nothing
    of go by age and size alone.
    """
    found = [one for one in contents.kept if not one.in_use]
    if criteria.dataset is not None:
        found = [one for one in found if one.datasets == {criteria.dataset}]
    if criteria.unused:
        # A run that has just made an entry says that it uses it a little later.
        old = now - _SCRAP_SECONDS
        found = [one for one in found if one.named and not one.datasets and one.used < old]
    if criteria.older_than is not None:
        found = [one for one in found if one.used < now - criteria.older_than]
    found.sort(key=lambda one: (one.used, one.name))
    if criteria.keep_below is None:
        return found
    too_much, taken = contents.bytes - criteria.keep_below, 0
    for number, one in enumerate(found):
        if taken >= too_much:
            return found[:number]
        taken += one.bytes
    return found


def delete(root: Path, to_delete: Sequence[CacheObject]) -> list[CacheObject]:
    """Delete these but what a process has begun to use meanwhile; gives those deleted."""
    leases, gone = Leases(root), []
    for start in range(0, len(to_delete), _BATCH):
        with leases.locked():
            held = leases.leased_keys()
            for one in to_delete[start : start + _BATCH]:
                if one.name not in held:
                    _delete(one.path)
                    gone.append(one)
    return gone


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Gone at once as what it is, and then bit by bit.
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.rename(hidden)
        shutil.rmtree(hidden)
        return
    path.unlink(missing_ok=True)
    note_of(path).unlink(missing_ok=True)


def by_dataset(
    contents: CacheContents, kept: Iterable[CacheObject]
) -> dict[str, list[CacheObject]]:
    """The things of each dataset by its short name, then :data:`UNKNOWN` and :data:`OTHER`.

    What several datasets use is in each.
    """
    found: dict[str, list[CacheObject]] = {name: [] for name in sorted(contents.datasets.values())}
    found |= {UNKNOWN: [], OTHER: []}
    for one in kept:
        names = [contents.datasets[key] for key in one.datasets]
        for name in names or [UNKNOWN if one.named else OTHER]:
            found[name].append(one)
    return {name: of_it for name, of_it in found.items() if of_it}
