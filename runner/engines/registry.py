"""The engines by name; the only module that knows them all."""

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


# Only the engine that is used is imported.
ENGINES: dict[str, Callable[[], Engine]] = {"musubi": _musubi, "diffusers": _diffusers}


def engine_named(name: str) -> Engine:
    """Return the engine of that name.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if name not in ENGINES:
        raise UserError(f"engine.name={name} is not a choice.{did_you_mean(name, ENGINES)}")
    return ENGINES[name]()
