"""The location of musubi-tuner: the runner's own install, or what engine.path and .python name."""

from __future__ import annotations

from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.paths import absolute
from runner.engines.base import EngineInstall
from runner.engines.musubi.packages import COMMAND, VERSION, engine_home, python_of
from runner.engines.musubi.version import checkout_version, installed_version


def located(config: RunConfig, cwd: Path) -> EngineInstall:
    """Find musubi-tuner, or the reason why it cannot run; reads only."""
    home = engine_home()
    python = python_of(home)
    places: list[Path] = []
    source: Path | None = None
    missing: str | None = None
    if config.engine.path is not None:
        source = absolute(config.engine.path, cwd)
        # musubi-tuner's README uses the first name with pip; uv uses the second.
        places = [source / name / "bin" / "python" for name in ("venv", ".venv")]
        python = next((place for place in places if place.is_file()), places[0])
        if not (source / "src" / "musubi_tuner").is_dir():
            missing = f"engine.path={config.engine.path} is no musubi-tuner checkout"
    if config.engine.python is not None:
        python, places = absolute(config.engine.python, cwd), []
    ours = config.engine.path is None and config.engine.python is None
    if ours and not ((home / "installed.json").is_file() and python.is_file()):
        what = "half installed" if (home / "venv").exists() else "not installed"
        missing = f"musubi-tuner {VERSION} is {what} in {home}: run {COMMAND}"
    elif missing is None and not python.is_file():
        missing = f"there is no Python at {' or '.join(map(str, places or [python]))}"
    if missing is not None:
        missing += ". Or point" if ours else ". Point"
        missing += (
            " engine.path and engine.python to an installed musubi-tuner, or rehearse "
            "without it: engine=diffusers model=tiny."
        )
    if ours:
        return EngineInstall(str(python), f"musubi-tuner {VERSION}", None, missing)
    version = installed_version(python) if source is None else checkout_version(source)
    return EngineInstall(
        str(python),
        version.text,
        None if source is None else str(source / "src"),
        missing,
        own_encoding=version.own_encoding,
        notice=version.notice,
    )
