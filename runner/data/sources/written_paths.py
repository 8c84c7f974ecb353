"""Find the files that a list means, whose paths may be of another computer or system."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from runner.core.text import counted, named, printable


class WrittenPaths:
    """Resolves the paths of one list, and remembers which were taken for a file elsewhere.

    Args:
        find: returns the name of the file at a path relative to the list, None if there is none.
    """

    def __init__(self, find: Callable[[str], str | None]) -> None:
        self._find = find
        self._meant: dict[str, str] = {}
        self.ambiguous: dict[str, str] = {}

    def resolve(self, written: str) -> str | None:
        """Return the name of the file that is meant, None if there is none.

        A path that is not there as written is taken with backslashes as separators, then by its
        last parts, as many as there is a file for. Two such paths may not mean one file.
        """
        for plain in dict.fromkeys((written, written.replace("\\", "/"))):
            if (name := self._find(plain)) is not None:
                return name
        for place in _elsewhere(written.replace("\\", "/")):
            name = self._find(place)
            if name is None:
                continue
            if self._meant.setdefault(name, written) != written:
                self.ambiguous[written] = self._meant[name]
                return None
            return name
        return None

    def notices(self, where: str) -> Iterator[str]:
        """Yield a notice on the paths that are not of this computer."""
        if self._meant:
            pairs = [f"{printable(path)} as {printable(n)}" for n, path in self._meant.items()]
            yield (
                f"{where}: {counted(len(pairs), 'path')} of another place, taken by the last "
                f"parts: {named(pairs, 3)}."
            )


def _elsewhere(path: str) -> Iterator[str]:
    """Yield where a path of another computer may be here; never what leads out of a folder."""
    drive = re.match(r"([A-Za-z]):/*", path)
    if drive:
        path = path[drive.end() :]
        yield f"/mnt/{drive[1].lower()}/{path}"  # Windows drives, as its subsystem for Linux has.
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if len(parts) > 64:
        return
    if ".." not in parts:
        for start in range(0 if drive or path.startswith("/") else 1, len(parts)):
            yield "/".join(parts[start:])
