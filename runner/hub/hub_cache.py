"""The hub's cache on this machine: what is in it, and what was checked.

Its layout is the one described in huggingface_hub's guide "Understand caching"::

    models--<owner>--<name>/refs/<branch>              the commit a branch was last seen at
    models--<owner>--<name>/snapshots/<commit>/<file>  a link to ../../blobs/<etag>
    models--<owner>--<name>/blobs/<etag>               the bytes; the etag is the sha256 of a
                                                       large (LFS) file, else git's blob id
    .locks/models--<owner>--<name>/<etag>.lock         held while a blob is made

and for a dataset ``datasets--`` in place of ``models--``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from runner.core.atomic import write_text

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ = 4 << 20


@dataclass(frozen=True)
class Request:
    """Files wanted from one repository at one revision (branch, tag or commit).

    ``files`` must be there; of what the repository has besides, files like ``patterns`` are taken
    too. ``branch`` is a name that programs will ask for offline: it is made to point at the
    commit. ``option`` is the option that holds the revision. ``repo_type`` is model or dataset.
    """

    repository: str
    revision: str
    files: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    branch: str | None = None
    option: str = "revision"
    repo_type: str = "model"

    def matches(self, file: str) -> bool:
        """Whether a file of the repository is wanted."""
        if file in self.files:
            return True
        # A pattern is for one folder: its * takes no slash.
        return any(
            fnmatch(file, pattern) and file.count("/") == pattern.count("/")
            for pattern in self.patterns
        )


@dataclass(frozen=True)
class HubFile:
    """A file in the cache: its place in the snapshot, its bytes, and the etag naming them.

    ``etag`` is None where the file system has no links, and the bytes lie in the snapshot.
    """

    path: Path
    blob: Path
    etag: str | None


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit, which never moves."""
    return _COMMIT.fullmatch(revision) is not None


class HubCache:
    """The cache at ``folder`` as far as it is of one type; ``checked`` is where it is noted which
    files were found whole."""

    def __init__(self, folder: Path, checked: Path, repo_type: str = "model") -> None:
        self.folder = folder
        self._type = repo_type
        self._checked = checked
        # The notes once more, for when they can't be written.
        self._notes: dict[str, dict[str, object]] = {}

    @classmethod
    def of_user(cls, checked: Path, repo_type: str = "model") -> HubCache:
        """The user's own cache, where HF_HOME and HF_HUB_CACHE put it."""
        from huggingface_hub import constants

        _make_folders_absolute()
        return cls(Path(constants.HF_HUB_CACHE).absolute(), checked, repo_type)

    def of(self, repository: str) -> Path:
        """A repository's folder."""
        return self.folder / f"{self._type}s--{repository.replace('/', '--')}"

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit of a revision as far as this machine knows."""
        if is_commit(revision):
            return revision
        try:
            commit = (self.of(repository) / "refs" / revision).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        # A damaged note, cut to nothing or filled with zeros by a crash, is none.
        return commit if commit.isalnum() else None

    def place(self, repository: str, commit: str, file: str) -> Path:
        """Where a file of a commit lies, or will lie."""
        return self.of(repository) / "snapshots" / commit / file

    def blob(self, repository: str, etag: str) -> Path:
        """Where the bytes named ``etag`` lie, or will lie."""
        return self.of(repository) / "blobs" / etag

    def lock(self, repository: str, etag: str) -> Path:
        """The file that every client of the hub locks while it makes a blob."""
        return self.folder / ".locks" / self.of(repository).name / f"{etag}.lock"

    def find(self, repository: str, commit: str | None, file: str) -> HubFile | None:
        """A file of a commit, or None when it is not here."""
        if commit is None:
            return None
        path = self.place(repository, commit, file)
        if not path.is_file():
            return None
        # One step only: a blob can itself be a link into a store shared by repositories, where
        # names are no etags.
        if path.is_symlink():
            target = Path(os.path.normpath(path.parent / path.readlink()))
            if target.parent.name == "blobs":
                return HubFile(path, target, target.name)
        return HubFile(path, path, None)

    def missing_files(self, request: Request) -> list[str]:
        """The required files of a request that are not here."""
        commit = self.commit(request.repository, request.revision)
        return [f for f in request.files if self.find(request.repository, commit, f) is None]

    def pointed(self, request: Request) -> bool:
        """Whether the request's branch points at the commit of its revision."""
        if request.branch is None:
            return True
        commit = self.commit(request.repository, request.revision)
        return commit is not None and commit == self.commit(request.repository, request.branch)

    def here(self, request: Request) -> dict[str, HubFile]:
        """The files of a request that are here, the optional ones included."""
        commit = self.commit(request.repository, request.revision)
        if commit is None:
            return {}
        top = self.place(request.repository, commit, "")
        names = {*request.files}
        for pattern in request.patterns:
            names.update(path.relative_to(top).as_posix() for path in top.glob(pattern))
        found = {name: self.find(request.repository, commit, name) for name in sorted(names)}
        return {name: cached for name, cached in found.items() if cached is not None}

    def unchecked(self, request: Request) -> int:
        """How many files of a request are here and were not read since they came."""
        return sum(self.known_sha256(cached) is None for cached in self.here(request).values())

    def link(self, repository: str, commit: str, file: str, etag: str) -> None:
        """Put a blob into a snapshot."""
        from huggingface_hub import constants

        place, blob = self.place(repository, commit, file), self.blob(repository, etag)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            if constants.HF_HUB_DISABLE_SYMLINKS:
                raise OSError("no links are wanted")
            temporary.symlink_to(os.path.relpath(blob, place.parent))
        except OSError:  # No links here: then the bytes themselves lie in the snapshot.
            blob.replace(place)
            return
        temporary.replace(place)

    def point(self, repository: str, branch: str, commit: str) -> bool:
        """Make a branch point at a commit; False when it did."""
        if is_commit(branch) or self.commit(repository, branch) == commit:
            return False
        write_text(self.of(repository) / "refs" / branch, commit)
        return True

    def known_sha256(self, cached: HubFile) -> str | None:
        """The sha256 found when the file was read, if it has the size and time it had then."""
        place = self._note(cached.blob)
        note = self._notes.get(place.name)
        try:
            if note is None:
                note = json.loads(place.read_text(encoding="utf-8"))
            stat = cached.blob.stat()
            if (note["size"], note["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
                return str(note["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def remember(self, file: Path, sha256: str) -> None:
        """Note that a file was read whole and has this sha256."""
        stat, place = file.stat(), self._note(file)
        note = {
            "file": str(file),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256,
        }
        self._notes[place.name] = note
        # Without the note the file is only read once more by the next run.
        with suppress(OSError):
            write_text(place, json.dumps(note, indent=1) + "\n")

    def _note(self, file: Path) -> Path:
        name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:40]
        return self._checked / f"{name}.json"

    def name_of(self, cached: HubFile) -> str | None:
        """A digest of a file without reading it: its name in the cache, or what a check noted.

        The name of a large file is its sha256, that of a small one git's blob id.
        """
        return cached.etag or self.known_sha256(cached)


def _make_folders_absolute() -> None:
    """Make the hub's relative folders absolute, for the programs that this one starts.

    They are started in other folders and would look for the cache, or the token, there.
    """
    from huggingface_hub import constants

    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        if not Path(folder := getattr(constants, name)).is_absolute():
            os.environ[name] = str(Path(folder).absolute())


def read_sha256(file: Path, etag: str | None, progress: Callable[[int], None]) -> tuple[str, bool]:
    """A file's sha256, and whether its bytes are those that ``etag`` names.

    A 64-digit etag is their sha256; a 40-digit one is git's blob id, the sha1 of ``blob <size>``,
    a zero byte and the bytes. Nothing can be said of other etags, which pass. ``progress`` is
    called with the bytes read so far.
    """
    sha256 = hashlib.sha256()
    git = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    is_git = etag is not None and is_commit(etag)
    done = 0
    with file.open("rb") as handle:
        while piece := handle.read(_READ):
            sha256.update(piece)
            if is_git:
                git.update(piece)
            done += len(piece)
            progress(done)
    found = sha256.hexdigest()
    if is_git:
        return found, git.hexdigest() == etag
    if etag is not None and _SHA256.fullmatch(etag):
        return found, found == etag
    return found, True
