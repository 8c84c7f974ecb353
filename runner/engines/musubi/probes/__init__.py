"""Programs for another Python, musubi-tuner's, which say what it has.

Each is run as the text of ``python -c``, so that no folder of the runner is on that Python's path,
and prints its answer as JSON on its last line. They run on Python 3.10 and import nothing of the
runner, which never imports them.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def program(name: str) -> str:
    """The text of one of the programs in this folder."""
    return (files(__name__) / f"{name}.py").read_text(encoding="utf-8")
