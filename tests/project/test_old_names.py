"""What the commands.sh of runs made before the rooms call goes on working."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_program


# Every module that an earlier run's commands.sh may name still runs under that name.
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("runner.stages.convert", "usage: python -m runner.stages.convert [-h] [--reverse]"),
        ("runner.hub", "usage: python -m runner.hub"),
        ("runner.engines.musubi_install", "usage: python -m runner.engines.musubi_install"),
        *(
            (f"runner.engines.diffusers.{name}", f"usage: {name}")
            for name in ("make_weights", "cache_latents", "cache_text", "train", "evaluate")
        ),
    ],
)
def test_old_names_run(tmp_path: Path, module: str, said: str) -> None:
    done = run_program("--help", cwd=tmp_path, module=module)
    assert done.code == 0, done.err
    assert done.out.startswith(said)
