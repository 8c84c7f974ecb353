"""The Hugging Face cache on this computer, and notes on which of its files were verified.

Its layout is the one described in huggingface_hub's guide "Understand caching"::

    models--<owner>--<name>/refs/<branch>              the commit a branch was last seen at
    models--<owner>--<name>/snapshots/<commit>/<file>  a link to ../../blobs/<etag>
    models--<owner>--<name>/blobs/<etag>               the bytes; the etag is the sha256 of a
                                                       large (LFS) file, else git's blob id
    .locks/models--<owner>--<name>/<etag>.lock         held while a blob is written

For a dataset, ``datasets--`` replaces ``models--``.
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

    Attributes:
        files: required files.
        patterns: patterns of optional files, which are fetched too if there are any.
        branch: a branch that programs will ask for offline; it is pointed at the commit.
        option: the option that holds the revision, for messages.
        repo_type: ``model`` or ``dataset``.
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
        # A pattern is for one folder: its * matches no slash.
        return any(
            fnmatch(file, pattern) and file.count("/") == pattern.count("/")
            for pattern in self.patterns
        )


@dataclass(frozen=True)
class HubFile:
    """A file in the cache: its path in the snapshot, its blob, and the blob's etag.

    ``etag`` is None on a file system without links, where the snapshot holds the file itself.
    """

    path: Path
    blob: Path
    etag: str | None


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which never moves."""
    return _COMMIT.fullmatch(revision) is not None


class HubCache:
    """The Hugging Face cache in ``folder``, for repositories of one type.

    ``checked`` is the folder of the notes on verified files.
    """

    def __init__(self, folder: Path, checked: Path, repo_type: str = "model") -> None:
        self.folder = folder
        self._type = repo_type
        self._checked = checked
        # A copy of the notes, in case they can't be written.
        self._notes: dict[str, dict[str, object]] = {}

    @classmethod
    def of_user(cls, checked: Path, repo_type: str = "model") -> HubCache:
        """Open the user's own cache, in the folder that HF_HOME and HF_HUB_CACHE name."""
        from huggingface_hub import constants

        _make_folders_absolute()
        return cls(Path(constants.HF_HUB_CACHE).absolute(), checked, repo_type)

    def of(self, repository: str) -> Path:
        """Return a repository's folder."""
        return self.folder / f"{self._type}s--{repository.replace('/', '--')}"

    def commit(self, repository: str, revision: str) -> str | None:
        """Return the commit of a revision, or None if the cache does not have it."""
        if is_commit(revision):
            return revision
        try:
            commit = (self.of(repository) / "refs" / revision).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        # Ignore a file that a crash left empty or filled with zeros.
        return commit if commit.isalnum() else None

    def path(self, repository: str, commit: str, file: str) -> Path:
        """Return the path that a file of a commit has or will have."""
        return self.of(repository) / "snapshots" / commit / file

    def blob(self, repository: str, etag: str) -> Path:
        """Return the path that the blob ``etag`` has or will have."""
        return self.of(repository) / "blobs" / etag

    def lock(self, repository: str, etag: str) -> Path:
        """Return the file that every client of the hub locks while it writes a blob."""
        return self.folder / ".locks" / self.of(repository).name / f"{etag}.lock"

    def find(self, repository: str, commit: str | None, file: str) -> HubFile | None:
        """Return a file of a commit, or None if it is not cached."""
        if commit is None:
            return None
        path = self.path(repository, commit, file)
        if not path.is_file():
            return None
        # Follow one link only: a blob can itself be a link into storage that repositories share,
        # where files are not named by their etag.
        if path.is_symlink():
            target = Path(os.path.normpath(path.parent / path.readlink()))
            if target.parent.name == "blobs":
                return HubFile(path, target, target.name)
        return HubFile(path, path, None)

    def missing_files(self, request: Request) -> list[str]:
        """Return the required files of a request that are not cached."""
        commit = self.commit(request.repository, request.revision)
        return [f for f in request.files if self.find(request.repository, commit, f) is None]

    def pointed(self, request: Request) -> bool:
        """Whether the request's branch points at the commit of its revision."""
        if request.branch is None:
            return True
        commit = self.commit(request.repository, request.revision)
        return commit is not None and commit == self.commit(request.repository, request.branch)

    def here(self, request: Request) -> dict[str, HubFile]:
        """Return the cached files of a request, including optional ones."""
        commit = self.commit(request.repository, request.revision)
        if commit is None:
            return {}
        top = self.path(request.repository, commit, "")
        names = {*request.files}
        for pattern in request.patterns:
            names.update(path.relative_to(top).as_posix() for path in top.glob(pattern))
        hub_files = {name: self.find(request.repository, commit, name) for name in sorted(names)}
        return {name: hub_file for name, hub_file in hub_files.items() if hub_file is not None}

    def unchecked(self, request: Request) -> int:
        """Count the cached files of a request that were not verified yet."""
        return sum(self.known_sha256(one) is None for one in self.here(request).values())

    def link(self, repository: str, commit: str, file: str, etag: str) -> None:
        """Link a blob into a snapshot; without links, move it there."""
        from huggingface_hub import constants

        path, blob = self.path(repository, commit, file), self.blob(repository, etag)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            if constants.HF_HUB_DISABLE_SYMLINKS:
                raise OSError("no links are wanted")
            temporary.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:
            blob.replace(path)
            return
        temporary.replace(path)

    def point(self, repository: str, branch: str, commit: str) -> bool:
        """Point a branch at a commit.

        Returns:
            False if it pointed there already.
        """
        if is_commit(branch) or self.commit(repository, branch) == commit:
            return False
        write_text(self.of(repository) / "refs" / branch, commit)
        return True

    def known_sha256(self, hub_file: HubFile) -> str | None:
        """Return the SHA-256 noted when the file was verified, if size and time are the same."""
        path = self._note(hub_file.blob)
        note = self._notes.get(path.name)
        try:
            if note is None:
                note = json.loads(path.read_text(encoding="utf-8"))
            stat = hub_file.blob.stat()
            if (note["size"], note["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
                return str(note["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def remember(self, file: Path, sha256: str) -> None:
        """Note that a file was verified and has this SHA-256."""
        stat, path = file.stat(), self._note(file)
        note = {
            "file": str(file),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256,
        }
        self._notes[path.name] = note
        # Without the note, the next run only verifies the file again.
        with suppress(OSError):
            write_text(path, json.dumps(note, indent=1) + "\n")

    def _note(self, file: Path) -> Path:
        name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:40]
        return self._checked / f"{name}.json"

    def name_of(self, hub_file: HubFile) -> str | None:
        """Return a digest of a file without reading it: its etag, or its noted SHA-256.

        The etag of a large file is its SHA-256, that of a small one git's blob id.
        """
        return hub_file.etag or self.known_sha256(hub_file)


def _make_folders_absolute() -> None:
    """Make the hub's relative folders absolute, for programs started in other folders.

    They would look for the cache and the token there.
    """
    from huggingface_hub import constants

    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        if not Path(folder := getattr(constants, name)).is_absolute():
            os.environ[name] = str(Path(folder).absolute())


def read_sha256(file: Path, etag: str | None, progress: Callable[[int], None]) -> tuple[str, bool]:
    """Hash a file and compare the result with its etag.

    Args:
        file: the file.
        etag: 64 digits are a SHA-256; 40 digits are git's blob id, the SHA-1 of ``blob <size>``, a
            zero byte and the content. Any other etag can't be checked and is accepted.
        progress: called with the number of bytes read so far.

    Returns:
        The file's SHA-256, and whether the etag matches.
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
    digest = sha256.hexdigest()
    if is_git:
        return digest, git.hexdigest() == etag
    if etag is not None and _SHA256.fullmatch(etag):
        return digest, digest == etag
    return digest, True
