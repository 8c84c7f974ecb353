"""Contents of the shared cache: which datasets use them, and which of them prune may delete."""

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

# Leftover files younger than this may belong to a process that is writing them.
_LEFTOVER_SECONDS = 3600.0
# Objects deleted per lock of the cache, which runs that start have to wait for.
_BATCH = 200
# Folders without entries: leases, unfinished media (deleted by BulkWriter), and notes on complete
# datasets of the hub, which are needed to use them offline.
_NOT_ENTRIES = ("claims", "uses", "incoming", "hub")
# In the folder of the tiny model's weights: notes on verified weights of the hub.
CHECKED = "checked"
# Labels for objects of no dataset: used by no recorded run, or of a kind that runs do not record.
UNKNOWN, OTHER = "(unknown)", "(other)"


@dataclass(frozen=True)
class CacheObject:
    """One object in the cache: an entry with its .json, a folder of weights, or a leftover file.

    Attributes:
        full_key: the full key of an entry; of another object its namespace, a slash and its name.
        namespace: the first part of it.
        path: the file or folder.
        bytes: its size.
        last_used: when it was last used or made, seconds since 1970.
        datasets: the keys of the datasets whose runs have used it.
        in_use: whether a living process makes or uses it.
        use_recorded: whether runs record their use of objects of this kind.
    """

    full_key: str
    namespace: str
    path: Path
    bytes: int
    last_used: float
    datasets: frozenset[str]
    in_use: bool
    use_recorded: bool


@dataclass(frozen=True)
class CacheContents:
    """Everything in a cache.

    Attributes:
        objects: its objects.
        datasets: the short name of each dataset, by its key.
        last_used: when a run last used each dataset, by its short name; seconds since 1970.
        leases: the leases of living processes.
    """

    objects: tuple[CacheObject, ...]
    datasets: dict[str, str]
    last_used: dict[str, float]
    leases: tuple[Lease, ...]

    @property
    def bytes(self) -> int:
        """The size of all objects."""
        return sum(one.bytes for one in self.objects)


@dataclass(frozen=True)
class PruneCriteria:
    """Which objects to delete: those that match all that is set.

    Attributes:
        older_than: not used for so many seconds.
        keep_below: the least recently used, until the cache is smaller than so many bytes.
        dataset: used by this dataset only (its key).
        unused: used by no recorded run.
    """

    older_than: float | None = None
    keep_below: int | None = None
    dataset: str | None = None
    unused: bool = False


def read_contents(root: Path, now: float) -> CacheContents:
    """Read what is in the cache at ``root``; write nothing.

    Raises:
        UserError: there is no cache.
    """
    if not root.is_dir():
        raise UserError(f"there is no cache at {root} yet: train once, or give --outputs")
    leases = Leases(root)
    using, making = leases.using.all(), leases.making.all()
    last: dict[str, float] = {}
    owners: dict[str, set[str]] = {}
    paths: dict[str, str] = {}
    of_dataset: dict[str, float] = {}
    for lease in using:
        key = _key(lease, paths)
        of_dataset[key] = max(of_dataset.get(key, 0.0), _time(lease))
        for name in lease.names:
            last[name] = max(last.get(name, 0.0), _time(lease))
            owners.setdefault(name, set()).add(key)
    running = tuple(lease for lease in (*using, *making) if lease.alive)
    held = frozenset().union(*(lease.names for lease in running))
    objects: list[CacheObject] = []
    for namespace in scan(root):
        if not namespace.is_dir(follow_symlinks=False) or namespace.name in _NOT_ENTRIES:
            continue
        for name, path, size, made in _scan_namespace(Path(namespace.path), now):
            full_key = f"{namespace.name}/{name}"
            objects.append(
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
    short = _short(paths)
    used = {short[key]: time for key, time in of_dataset.items()}
    return CacheContents(tuple(objects), short, used, running)


def _time(lease: Lease) -> float:
    time = lease.data.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


def _key(lease: Lease, paths: dict[str, str]) -> str:
    """Return the key of a lease's dataset, and add its short name to ``paths``."""
    dataset = lease.data.get("dataset")
    dataset = dataset if isinstance(dataset, dict) else {}
    name = str(dataset.get("name", "unnamed"))
    parts = dataset.get("paths")
    key = " + ".join(map(str, parts)) if isinstance(parts, list) and parts else name
    paths[key] = name
    return key


def _short(paths: dict[str, str]) -> dict[str, str]:
    """Return each dataset's short name if no other has the same, else its path."""
    names = list(paths.values())
    return {key: name if names.count(name) == 1 else key for key, name in paths.items()}


def _scan_namespace(namespace: Path, now: float) -> Iterator[tuple[str, Path, int, float]]:
    """Yield name, path, bytes and modification time of everything in a namespace."""
    if namespace.name == "weights":
        # The files of a model are useful only together.
        for model in scan(namespace):
            size, made = _measure(Path(model.path))
            if not model.name.startswith(".") or now - made > _LEFTOVER_SECONDS:
                yield model.name, Path(model.path), size, made
        return
    for file, size, made in _files(namespace):
        leftover = file.name.startswith(".")
        if namespace.name in NAMESPACES and not leftover:
            note = note_of(file)
            if file.name.endswith(".json"):
                # Counted with its entry; without one it is a leftover.
                leftover = not file.with_name(file.name.removesuffix(".json")).exists()
                if not leftover:
                    continue
            with suppress(OSError):
                size += note.stat().st_size
        if not leftover or now - made > _LEFTOVER_SECONDS:
            yield file.name, file, size, made


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    for child in scan(folder):
        try:
            if child.is_dir(follow_symlinks=False):
                yield from _files(Path(child.path))
            else:
                stat = child.stat(follow_symlinks=False)
                yield Path(child.path), stat.st_size, stat.st_mtime
        except OSError:  # Deleted meanwhile.
            continue


def _measure(path: Path) -> tuple[int, float]:
    """Return the bytes of a file or folder, and its newest modification time."""
    files = list(_files(path)) if path.is_dir() else []
    with suppress(OSError):
        stat = path.stat(follow_symlinks=False)
        files.append((path, 0 if path.is_dir() else stat.st_size, stat.st_mtime))
    return sum(size for _, size, _ in files), max((made for _, _, made in files), default=0.0)


def dataset_key(contents: CacheContents, wanted: str) -> str:
    """Return the key of the dataset with that name or path.

    Raises:
        UserError: there is none; the message suggests the most similar name.
    """
    for key, name in contents.datasets.items():
        if wanted in (key, name) or os.path.normpath(Path(wanted).absolute()) == key:
            return key
    if not contents.datasets:
        raise UserError(f"--dataset {wanted}: no run has said what it uses yet")
    raise UserError(
        f"--dataset {wanted}: nothing in the cache is of it."
        f"{did_you_mean(wanted, contents.datasets.values())}"
    )


def matching(contents: CacheContents, criteria: PruneCriteria, now: float) -> list[CacheObject]:
    """Select the objects to delete, least recently used first.

    Never one that a living process makes or uses. With ``dataset``, objects that another dataset
    uses too are kept. Objects whose use runs do not record are selected by age and size alone.
    """
    candidates = [one for one in contents.objects if not one.in_use]
    if criteria.dataset is not None:
        candidates = [one for one in candidates if one.datasets == {criteria.dataset}]
    if criteria.unused:
        # A run leases an entry shortly after making it.
        old = now - _LEFTOVER_SECONDS
        candidates = [
            one
            for one in candidates
            if one.use_recorded and not one.datasets and one.last_used < old
        ]
    if criteria.older_than is not None:
        candidates = [one for one in candidates if one.last_used < now - criteria.older_than]
    candidates.sort(key=lambda one: (one.last_used, one.full_key))
    if criteria.keep_below is None:
        return candidates
    excess, selected = contents.bytes - criteria.keep_below, 0
    for number, one in enumerate(candidates):
        if selected >= excess:
            return candidates[:number]
        selected += one.bytes
    return candidates


def delete(root: Path, to_delete: Sequence[CacheObject]) -> list[CacheObject]:
    """Delete objects, except those that a process has begun to use meanwhile.

    Returns:
        The deleted objects.
    """
    leases, deleted = Leases(root), []
    for start in range(0, len(to_delete), _BATCH):
        with leases.locked():
            held = leases.leased_keys()
            for one in to_delete[start : start + _BATCH]:
                if one.full_key not in held:
                    _delete(one.path)
                    deleted.append(one)
    return deleted


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Renamed first, so that no process finds a folder with half of its files.
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.rename(hidden)
        shutil.rmtree(hidden)
        return
    path.unlink(missing_ok=True)
    note_of(path).unlink(missing_ok=True)


def by_dataset(
    contents: CacheContents, objects: Iterable[CacheObject]
) -> dict[str, list[CacheObject]]:
    """Group objects by the short name of their dataset, then :data:`UNKNOWN` and :data:`OTHER`.

    An object that several datasets use is in the group of each.
    """
    names = [*sorted(contents.datasets.values()), UNKNOWN, OTHER]
    groups: dict[str, list[CacheObject]] = {name: [] for name in names}
    for one in objects:
        datasets = [contents.datasets[key] for key in one.datasets]
        for name in datasets or [UNKNOWN if one.use_recorded else OTHER]:
            groups[name].append(one)
    return {name: members for name, members in groups.items() if members}
