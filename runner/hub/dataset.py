"""Datasets of the Hugging Face hub: media, captions and archives, in the Hugging Face cache.

They are used from the cache like a folder. The files of a commit are noted, so that a cached
dataset needs no network; a branch is looked up again only with ``stages.force=[dataset]``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from runner.core.atomic import write_text
from runner.core.errors import StageError, UserError
from runner.core.text import counted, readable
from runner.formats.caption_files import TEXT_ENDINGS
from runner.formats.media_types import hidden, is_archive, media_kind_of
from runner.hub.hub_cache import HubCache, Request

if TYPE_CHECKING:
    from runner.hub.progress import DownloadListener
    from runner.hub.remote import Remote

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Container formats whose media are not files.
_PACKED = (".parquet", ".arrow")


@dataclass(frozen=True)
class HubDataset:
    """One repository at one commit; ``folder`` is its snapshot in the cache."""

    repository: str
    revision: str
    commit: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.repository} ({self.commit[:12]})"


@dataclass(frozen=True)
class _Listed(Request):
    """A request for all useful files of a repository, before their names are known."""

    def matches(self, file: str) -> bool:
        """Whether a file is useful, or holds media that can't be read."""
        return is_wanted(file) or file.lower().endswith(_PACKED)


class HubDatasets:
    """The datasets in the user's Hugging Face cache; ``root`` is the shared cache's folder."""

    def __init__(self, root: Path) -> None:
        self._notes = root / "hub"
        self._hub_cache = HubCache.of_user(root / "weights" / "checked", repo_type="dataset")

    def fetch(
        self, repository: str, revision: str, watcher: DownloadListener, *, force: bool = False
    ) -> HubDataset:
        """Fetch and verify a dataset; the hub is not asked if all of it is cached.

        Args:
            repository: ``owner/name``.
            revision: a branch, tag or commit.
            watcher: listens to the download.
            force: ask the hub anyway, and verify every file again.

        Raises:
            UserError: the dataset can't be used.
            StageError: it can't be downloaded.
        """
        from runner.hub.fetch import fetch_files

        cached = None if force else self.find(repository, revision)
        if cached is not None:
            return cached
        remote = self._look_up(repository, revision)
        names = _usable(remote)
        fetch_files([_request(remote, names)], self._hub_cache, watcher, force=force)
        # Without the note, the next run only asks the hub again.
        with suppress(OSError):
            write_text(self._note(repository, remote.commit), json.dumps({"files": names}) + "\n")
        return self._made(repository, revision, remote.commit)

    def planned(self, repository: str, revision: str) -> HubDataset:
        """Return the dataset if it is cached, for a dry run; nothing is fetched or noted.

        Raises:
            UserError: it is not cached (the message says how much there is to fetch), or it can't
                be used.
            StageError: it can't be looked up.
        """
        cached = self.find(repository, revision)
        if cached is not None:
            return cached
        remote = self._look_up(repository, revision)
        names = _usable(remote)
        missing_files = [
            file
            for file in remote.files
            if file.name in names and not self._hub_cache.find(repository, remote.commit, file.name)
        ]
        if missing_files:
            raise UserError(
                f"the dataset {repository} is not on this computer yet "
                f"({counted(len(missing_files), 'file')}, "
                f"{readable(sum(f.size for f in missing_files))} at "
                f"commit {remote.commit[:12]}), and dry_run=true fetches nothing. Start without "
                "dry_run, which fetches it first, or run: "
                f"hf download {repository} --repo-type dataset --revision {revision}"
            )
        return self._made(repository, revision, remote.commit)

    def find(self, repository: str, revision: str) -> HubDataset | None:
        """Return the dataset if all of it is cached, else None.

        Raises:
            UserError: ``repository`` is not the name of a dataset.
        """
        if not _NAME.fullmatch(repository):
            raise UserError(
                f"dataset=hub needs the name of a dataset, dataset.path=owner/name: {repository!r} "
                "is not one."
            )
        commit = self._hub_cache.commit(repository, revision)
        if commit is None:
            return None
        try:
            names = json.loads(self._note(repository, commit).read_text("utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not all(self._hub_cache.find(repository, commit, name) for name in names):
            return None
        return self._made(repository, revision, commit)

    def _made(self, repository: str, revision: str, commit: str) -> HubDataset:
        folder = self._hub_cache.path(repository, commit, "")
        return HubDataset(repository, revision, commit, folder)

    def _note(self, repository: str, commit: str) -> Path:
        return self._notes / self._hub_cache.of(repository).name / f"{commit}.json"

    def _look_up(self, repository: str, revision: str) -> Remote:
        from runner.hub.remote import look_up, offline

        if offline():
            raise StageError(
                f"HF_HUB_OFFLINE is set and the dataset {repository} ({revision}) was not "
                "completely fetched by an earlier run: run once without it."
            )
        listed = _Listed(repository, revision, (), option="dataset.revision", repo_type="dataset")
        return look_up(listed)


def is_wanted(file: str) -> bool:
    """Whether a file of a repository is a picture, a clip, a caption or an archive."""
    known = PurePosixPath(file).suffix.lower() in TEXT_ENDINGS or is_archive(file)
    return not hidden(file) and (known or media_kind_of(file) is not None)


def _usable(remote: Remote) -> list[str]:
    names = [file.name for file in remote.files]
    wanted = [name for name in names if is_wanted(name)]
    what = f"the dataset {remote.request.repository}"
    archives = [name for name in wanted if is_archive(name)]
    if any(media_kind_of(name) for name in wanted) or len(archives) == 1:
        return wanted
    if archives:
        raise UserError(
            f"{what} keeps its media in {len(archives)} archives such as {archives[0]}, of which "
            f"one can be read: fetch some (hf download {remote.request.repository} --repo-type "
            "dataset) and name each in dataset.sources."
        )
    packed = [name for name in names if name not in wanted]
    if packed:
        suffixes = ", ".join(sorted({PurePosixPath(name).suffix for name in packed}))
        raise UserError(
            f"{what} keeps its media inside {suffixes} files, which can't be read here: save them "
            "as pictures or clips with a .txt beside each (datasets.load_dataset reads them), and "
            "give that folder."
        )
    raise UserError(f"{what} has no picture, clip or archive.")


def _request(remote: Remote, names: Iterable[str]) -> Request:
    """Request the files of the commit that was listed, because the branch may have moved."""
    request = remote.request
    return Request(
        request.repository,
        remote.commit,
        tuple(names),
        branch=request.revision,
        option=request.option,
        repo_type=request.repo_type,
    )
