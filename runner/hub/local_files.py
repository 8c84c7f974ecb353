"""Weights in files of this computer, and notes on their hashes.

A file may have 33 GB, so its SHA-256 is noted with its identity, and computed again only when that
has changed. The planner reads the notes; the weights stage makes them, with the command
``python -m runner.hub.local_files``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.core.atomic import write_text
from runner.core.errors import StageError, UserError
from runner.core.file_identity import identity_of
from runner.core.paths import absolute
from runner.core.text import did_you_mean
from runner.formats.published_check import check_file
from runner.formats.safetensors_header import DamagedFileError
from runner.hub.command import exit_code_of, run
from runner.hub.hub_cache import read_sha256
from runner.hub.progress import DownloadListener, DownloadProgress

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class LocalFile:
    """A part of the model in a file of this computer.

    Attributes:
        part: transformer, vae, text_encoder, byt5 or image_encoder.
        path: its absolute path, as the option or the folder has it.
        size: its bytes.
        sha256: its SHA-256; None until it was computed.
    """

    part: str
    path: Path
    size: int
    sha256: str | None

    def record(self) -> dict[str, str | int | None]:
        """Return what the records of a run say of it."""
        return {
            "part": self.part,
            "source": "local",
            "file": str(self.path),
            "size": self.size,
            "sha256": self.sha256,
        }


def is_local(value: str) -> bool:
    """Whether the value of an option such as ``model.vae`` is a path, and no file of the hub."""
    return value.startswith(("/", "~", "./", "../"))


def existing_weights(key: str, text: str, cwd: Path) -> Path:
    """Return the absolute path of a file of weights that an option names.

    Args:
        key: the option.
        text: its value, as typed.
        cwd: the folder that a relative path starts at.

    Raises:
        UserError: there is no such file, or musubi-tuner would not read it as safetensors.
    """
    path = absolute(text, cwd)
    if path.is_dir():
        raise UserError(f"{key}={text} is a folder: give a file, or model.folder={text}.")
    if not path.is_file():
        raise UserError(f"{key}={text}: there is no such file.{_near(path)}")
    if path.suffix != _SUFFIX:
        raise UserError(f"{key}={text} is no {_SUFFIX} file, and no other is read.")
    return path


def existing_folder(key: str, text: str, cwd: Path) -> Path:
    """Return the absolute path of a folder that an option names.

    Raises:
        UserError: there is no such folder.
    """
    path = absolute(text, cwd)
    if not path.is_dir():
        raise UserError(f"{key}={text}: there is no such folder.{_near(path)}")
    return path


def _near(path: Path) -> str:
    """Suggest a name of the folder that ``path`` would be in."""
    try:
        return did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""


def checked_file(part: str, path: Path, hashes: Hashes, *, whole: bool) -> LocalFile:
    """Check the header of a local file, and return the file with its hash if that is known.

    Args:
        part: transformer, vae, text_encoder, byt5 or image_encoder.
        path: the file.
        hashes: the notes on hashes.
        whole: whether the tensors that only musubi-tuner reads must be there too.

    Raises:
        UserError: it is gone, damaged, or not this model's.
    """
    try:
        check_file(part, path, whole=whole)
    except DamagedFileError as error:
        raise UserError(f"{error} (model.{part}): copy it here again.") from None
    return LocalFile(part, path, path.stat().st_size, hashes.known(path))


class Hashes:
    """Notes on the SHA-256 of local files, in the folder ``notes``."""

    def __init__(self, notes: Path) -> None:
        self._folder = notes

    def known(self, file: Path) -> str | None:
        """Return a file's SHA-256, if the file is the one that it was noted for."""
        try:
            note = json.loads(self._note(file).read_text(encoding="utf-8"))
            return str(note["sha256"]) if note["identity"] == _identity(file) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def compute(self, file: Path, listener: DownloadListener, *, again: bool = False) -> str:
        """Return a file's SHA-256, and note it; a noted one is returned unless ``again``.

        Raises:
            StageError: the file was changed while it was read.
            OSError: it cannot be read.
        """
        if not again and (known := self.known(file)):
            return known
        before = _identity(file)
        size = file.stat().st_size
        sha256, _ = read_sha256(file, None, lambda done: listener.checking(str(file), done, size))
        if _identity(file) != before:
            raise StageError(f"{file} was changed while it was read: start again.")
        note = {"file": str(file), "identity": before, "sha256": sha256}
        # Without the note, the next run only reads the file again.
        with suppress(OSError):
            write_text(self._note(file), json.dumps(note, indent=1) + "\n")
        return sha256

    def _note(self, file: Path) -> Path:
        # Not the name that the note on a file of the hub's cache would have (HubCache).
        name = hashlib.sha256(b"local " + os.fsencode(file.resolve())).hexdigest()[:40]
        return self._folder / f"{name}.json"


def _identity(file: Path) -> list[int]:
    # Without the device, whose number changes when a network disk is mounted again.
    return list(identity_of(file.stat())[1:])


def main() -> int:
    """Hash files; return 1, after an error of one line, if that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m runner.hub.local_files",
        description="Compute the SHA-256 of weights on this computer, and note it for later runs.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="file")
    parser.add_argument("--checked", type=Path, required=True, help="folder of the notes")
    parser.add_argument("--force", action="store_true", help="read files again that are known")
    parsed = parser.parse_args()
    hashes = Hashes(parsed.checked)

    def work(progress: DownloadProgress) -> Iterator[str]:
        for file in parsed.files:
            yield f"{hashes.compute(file, progress, again=parsed.force)}  {file}"

    return run(work)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
