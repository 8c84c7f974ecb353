"""What the commands.sh of runs made before the rooms call goes on working."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_program


# Every module that an earlier run's commands.sh may name still runs under that name.
@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("runner.stages.convert", 1, "usage: python -m runner.stages.convert [--reverse] FROM"),
        ("runner.hub", 0, "usage: python -m runner.hub"),
        ("runner.engines.musubi_install", 0, "usage: python -m runner.engines.musubi_install"),
        *(
            (f"runner.engines.diffusers.{name}", 0, f"usage: {name}")
            for name in ("make_weights", "cache_latents", "cache_text", "train", "evaluate")
        ),
    ],
)
def test_old_names_run(tmp_path: Path, module: str, code: int, said: str) -> None:
    arguments = () if code else ("--help",)
    done = run_program(*arguments, cwd=tmp_path, module=module)
    assert done.code == code, done.err
    assert (done.out + done.err).startswith(said)
