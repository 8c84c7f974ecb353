"""The hub's cache on this machine: where it is, and what is made of a damaged one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP

from runner.hub.hub_cache import HubCache, Request

LOOK = """
import os, subprocess, sys
from pathlib import Path
from runner.hub.hub_cache import HubCache

print(HubCache.of_user(Path("checked")).folder)
os.mkdir("run")
child = "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE, c.HF_TOKEN_PATH)"
sys.stdout.flush()
subprocess.run([sys.executable, "-c", child], cwd="run", check=True)
"""


# A relative place of the cache is meant from where the program was started, for the runner and for
# the engine's commands, which are started in the run's folder.
@pytest.mark.parametrize(
    ("given", "hub"),
    [({"HF_HOME": "mine"}, "mine/hub"), ({"HF_HOME": "mine", "HF_HUB_CACHE": "other"}, "other")],
)
def test_a_relative_place(tmp_path: Path, given: dict[str, str], hub: str) -> None:
    ours = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=tmp_path,
        env={**kept, **given, "PYTHONPATH": str(TOP)},
        capture_output=True,
        text=True,
    )
    place = tmp_path / hub
    assert done.stdout.splitlines() == [str(place), f"{place} {tmp_path / 'mine/token'}"], done


# A note of a branch that names no commit, as a crash or a failing disk leaves it, is as good as
# none, and is written anew.
@pytest.mark.parametrize("damaged", [b"\xff\xfe\x80" * 10, bytes(40), b""])
def test_a_damaged_branch(tmp_path: Path, damaged: bytes) -> None:
    cache = HubCache(tmp_path, tmp_path / "checked")
    refs = cache.of("owner/model") / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(damaged)
    assert cache.commit("owner/model", "main") is None
    assert cache.missing_files(Request("owner/model", "main", ("a",))) == ["a"]
    assert cache.point("owner/model", "main", "a" * 40)
    assert cache.commit("owner/model", "main") == "a" * 40
