"""The engines by name; the only place that knows them all."""

from __future__ import annotations

from collections.abc import Callable

from runner.core.errors import UserError
from runner.core.text import did_you_mean
from runner.engines.base import Engine


def _musubi() -> Engine:
    from runner.engines.musubi.engine import MusubiEngine

    return MusubiEngine()


def _diffusers() -> Engine:
    from runner.engines.diffusers.engine import DiffusersEngine

    return DiffusersEngine()


_ENGINES: dict[str, Callable[[], Engine]] = {"musubi": _musubi, "diffusers": _diffusers}


def register(name: str, make: Callable[[], Engine]) -> None:
    """Make an engine known as ``engine.name=NAME``."""
    _ENGINES[name] = make


def engine_named(name: str) -> Engine:
    """The engine of that name. Raises :class:`UserError` with the nearest for an unknown one."""
    if name not in _ENGINES:
        raise UserError(f"engine.name={name} is not a choice.{did_you_mean(name, _ENGINES)}")
    return _ENGINES[name]()
