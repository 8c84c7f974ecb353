"""A command, as the program runs it and as a user can run it in a shell; pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Arguments and changes to the environment; the working folder is the run's folder."""

    argv: tuple[str, ...]
    set_env: tuple[tuple[str, str], ...] = ()
    unset_env: tuple[str, ...] = ()

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the environment to run in, derived from the runner's own."""
        kept = {key: value for key, value in base.items() if key not in self.unset_env}
        return kept | dict(self.set_env)

    def shell(self) -> str:
        """Render the command for a shell; a long one has each option on a line of its own."""
        words = [shlex.quote(word) for word in self.argv]
        prefix: list[str] = []
        if self.unset_env or self.set_env:
            prefix = ["env"]
            prefix += [word for name in self.unset_env for word in ("-u", name)]
            prefix += [f"{key}={shlex.quote(value)}" for key, value in self.set_env]
        line = " ".join(prefix + words)
        if len(line) <= 100:
            return line
        # The program and the module it runs stay together; each option gets a line of its own.
        first = words.index("-m") + 2 if "-m" in words[1:3] else 1
        lines = [" ".join(prefix + words[:first])]
        rest = words[first:]
        while rest:
            group = [rest.pop(0)]
            while rest and not rest[0].startswith("-"):
                group.append(rest.pop(0))
            lines.append(" ".join(group))
        return " \\\n    ".join(lines)
