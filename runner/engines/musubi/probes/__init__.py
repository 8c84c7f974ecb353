"""Small programs that musubi-tuner's Python runs, to report what is installed in it.

Each is run as the text of ``python -c``, so that no folder of the runner is on that Python's path,
and prints its answer as JSON on its last line. They run on Python 3.10 and import nothing from the
runner, which never imports them.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def program(name: str) -> str:
    """Return the text of a program in this folder."""
    return (files(__name__) / f"{name}.py").read_text(encoding="utf-8")
