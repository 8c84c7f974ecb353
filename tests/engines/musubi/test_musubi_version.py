"""musubi-tuner of another version: it is named, and its caches are kept apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import compose

from runner.engines.musubi import version
from runner.engines.musubi.engine import MusubiEngine
from runner.engines.musubi.version import checkout_version, sources_digest


def checkout(folder: Path, declared: str | None, script: str = "print(1)\n") -> Path:
    """A checkout with a pyproject.toml and one of the cache scripts."""
    package = folder / "src" / "musubi_tuner"
    package.mkdir(parents=True)
    (package / "hv_1_5_cache_latents.py").write_bytes(script.encode())
    if declared is not None:
        (folder / "pyproject.toml").write_text(f'[project]\nversion = "{declared}"\n')
    return folder


# The pinned version has the keys that it always had, also with Windows' ends of lines; another
# version has keys with its name, and so has one of unknown version, or with other cache scripts.
def test_only_the_pinned_version_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = checkout(tmp_path / "pinned", "0.3.4")
    digest = sources_digest(pinned / "src" / "musubi_tuner")
    monkeypatch.setattr(version, "PINNED_SOURCES", digest)
    windows = checkout(tmp_path / "windows", "0.3.4", "print(1)\r\n")
    for folder in (pinned, windows):
        found = checkout_version(folder)
        assert (found.text, found.own_encoding) == ("musubi-tuner v0.3.4", None)
        assert found.notice is None
    newer = checkout_version(checkout(tmp_path / "newer", "0.3.5"))
    assert newer.own_encoding == f"musubi-tuner v0.3.5, {digest}"
    assert str(newer.notice).startswith("engine.path has musubi-tuner v0.3.5, and this runner ")
    changed = checkout_version(checkout(tmp_path / "changed", "0.3.4", "print(2)\n"))
    assert changed.text == "musubi-tuner v0.3.4 with changed cache scripts"
    unknown = checkout_version(checkout(tmp_path / "unknown", None))
    assert unknown.own_encoding == f"musubi-tuner of an unknown version, {digest}"
    other = checkout_version(checkout(tmp_path / "other", None, "print(2)\n"))
    encodings = {found.own_encoding for found in (newer, changed, unknown, other)}
    assert len(encodings - {None}) == 4


# The engine finds it, so that plans show the notice and keys have the version.
def test_the_install_has_it(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "a", "0.3.9")
    found = MusubiEngine().locate(compose(f"engine.path={folder}"), tmp_path)
    assert found.version == "musubi-tuner v0.3.9"
    assert str(found.own_encoding).startswith("musubi-tuner v0.3.9, ")
    assert "made for v0.3.4" in str(found.notice)
    ours = MusubiEngine().locate(compose(), tmp_path)
    assert (ours.own_encoding, ours.notice) == (None, None)
