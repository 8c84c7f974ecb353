"""Where the config groups lie, and what they offer."""

from __future__ import annotations

from pathlib import Path


def conf_folder() -> Path:
    """The folder of config groups, in a checkout and in an installed wheel alike."""
    return Path(__file__).resolve().parents[2] / "conf"


def groups(conf: Path) -> dict[str, list[str]]:
    """Config groups and their choices, from the files."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir() and not folder.name.startswith(("_", "."))
    }
