"""The folder of config groups, and the choices of each group."""

from __future__ import annotations

from pathlib import Path


def conf_folder() -> Path:
    """Return the folder of config groups, in a checkout or an installed wheel."""
    return Path(__file__).resolve().parents[2] / "conf"


def groups(conf: Path) -> dict[str, list[str]]:
    """List the choices of each config group from its YAML files."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir() and not folder.name.startswith(("_", "."))
    }
