"""musubi-tuner of another version: it is named, and its caches are kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import compose

from runner.engines.musubi import version
from runner.engines.musubi.engine import MusubiEngine
from runner.engines.musubi.version import checkout_version, installed_version, sources_digest


def checkout(folder: Path, declared: str | None, script: str = "print(1)\n") -> Path:
    """A checkout with a pyproject.toml and one of the cache scripts."""
    package = folder / "src" / "musubi_tuner"
    package.mkdir(parents=True)
    (package / "hv_1_5_cache_latents.py").write_bytes(script.encode())
    if declared is not None:
        (folder / "pyproject.toml").write_text(f'[project]\nversion = "{declared}"\n')
    return folder


def training_digest(folder: Path) -> str:
    """The digest of the scripts that only training runs."""
    return sources_digest(folder / "src" / "musubi_tuner", version._TRAINING)


def installed(folder: Path, declared: str, *, editable: Path | None = None) -> Path:
    """The Python of an environment with musubi-tuner as pip installs it; nothing runs it."""
    packages = folder / "lib" / "python3.11" / "site-packages"
    described = packages / f"musubi_tuner-{declared}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: musubi-tuner\nVersion: {declared}\n"
    )
    if editable is None:
        (packages / "musubi_tuner").mkdir()
        (packages / "musubi_tuner" / "hv_1_5_cache_latents.py").write_text("print(1)\n")
    else:
        origin = {"url": editable.as_uri(), "dir_info": {"editable": True}}
        (described / "direct_url.json").write_text(json.dumps(origin))
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    return folder / "bin" / "python"


# The pinned version has the keys that it always had, also with Windows' ends of lines; another
# version has keys with its name, and so has one of unknown version, or with other cache scripts.
def test_only_the_pinned_version_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = checkout(tmp_path / "pinned", "0.3.4")
    digest = sources_digest(pinned / "src" / "musubi_tuner")
    monkeypatch.setattr(version, "PINNED_SOURCES", digest)
    monkeypatch.setattr(version, "PINNED_TRAINING", training_digest(pinned))
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


# A trainer that was changed is named, and does not change what is cached.
def test_a_changed_trainer_is_not_the_pinned_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkout(tmp_path, "0.3.4")
    package = folder / "src" / "musubi_tuner"
    monkeypatch.setattr(version, "PINNED_SOURCES", sources_digest(package))
    monkeypatch.setattr(version, "PINNED_TRAINING", training_digest(folder))
    assert checkout_version(folder).notice is None
    (package / "hv_train_network.py").write_text("print(2)\n")
    found = checkout_version(folder)
    assert (found.text, found.own_encoding) == (
        "musubi-tuner v0.3.4 with changed training scripts",
        None,
    )
    assert found.notice == (
        "engine.path has musubi-tuner v0.3.4 with changed training scripts, and this runner is "
        "made for v0.3.4: its options and results may differ."
    )


# With engine.python alone the version is that of the package that this Python has, also of one that
# is installed from a checkout for editing; where there is none it is not guessed.
def test_the_version_is_that_of_the_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = installed(tmp_path / "newer", "0.3.9")
    found = MusubiEngine().locate(compose(f"engine.python={newer}"), tmp_path)
    assert found.version == "musubi-tuner v0.3.9"
    assert str(found.own_encoding).startswith("musubi-tuner v0.3.9, ")
    assert str(found.notice).startswith("engine.python has musubi-tuner v0.3.9, and this runner ")
    source = checkout(tmp_path / "my source", "0.4.0")
    python = installed(tmp_path / "editable", "0.3.4", editable=source)
    assert installed_version(python).text == "musubi-tuner v0.4.0"
    bare = tmp_path / "bare" / "bin" / "python"
    bare.parent.mkdir(parents=True)
    bare.touch()
    unknown = MusubiEngine().locate(compose(f"engine.python={bare}"), tmp_path)
    assert unknown.version == "musubi-tuner of an unknown version"
    assert str(bare) in str(unknown.own_encoding)
    assert "engine.python has musubi-tuner of an unknown version" in str(unknown.notice)
    pinned = installed(tmp_path / "pinned", "0.3.4")
    package = pinned.parent.parent / "lib" / "python3.11" / "site-packages" / "musubi_tuner"
    monkeypatch.setattr(version, "PINNED_SOURCES", sources_digest(package))
    digest = sources_digest(package, version._TRAINING)
    monkeypatch.setattr(version, "PINNED_TRAINING", digest)
    assert installed_version(pinned) == version.FoundVersion("musubi-tuner v0.3.4")
