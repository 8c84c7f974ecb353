"""Passwords of addresses, kept in environment variables and out of all text.

An address with a password, ``http://ann:PASSWORD@host``, is turned into one that names a variable,
``http://ann:${oc.env:RUNNER_PASSWORD_1}@host``, before Hydra or a file gets it. OmegaConf puts the
password back when a config is resolved, and jobs in other processes inherit the variable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from runner.tracking.secrets import HUB_TOKEN, PASSWORD_VARIABLE, password_span

if TYPE_CHECKING:
    from omegaconf import DictConfig

_REFERENCE = re.compile(rf"\$\{{oc\.env:({PASSWORD_VARIABLE}\d+)\}}")
_INTERPOLATION = re.compile(r"\$\{[^}]*\}")


def hidden(value: str, environment: MutableMapping[str, str]) -> str:
    """Move the password of an address, or a hub token, from a value to a variable.

    Args:
        value: the complete value of an option, such as an address.
        environment: where the variable is set, unless one has the password already.

    Returns:
        The value with a reference to the variable.
    """
    span = password_span(value)
    # An interpolation is a reference already, not a password.
    if span is not None and not _INTERPOLATION.search(value, *span):
        start, end = span
        return f"{value[:start]}{_reference(value[start:end], environment)}{value[end:]}"
    return HUB_TOKEN.sub(lambda token: _reference(token[0], environment), value)


def revealed(value: str, environment: Mapping[str, str]) -> str | None:
    """Undo :func:`hidden`; return None if a variable is not set."""
    if any(name not in environment for name in _REFERENCE.findall(value)):
        return None
    return _REFERENCE.sub(lambda reference: environment[reference[1]], value)


def remember(value: object, environment: MutableMapping[str, str]) -> None:
    """Store the passwords of a resolved config in variables, so that all output hides them."""
    if isinstance(value, str):
        if span := password_span(value):
            _reference(value[slice(*span)], environment)
    elif isinstance(value, Mapping):
        for item in value.values():
            remember(item, environment)
    elif isinstance(value, list | tuple):
        for item in value:
            remember(item, environment)


def hide_in_config(config: DictConfig, environment: MutableMapping[str, str]) -> None:
    """Apply :func:`hidden` to every value of a config, including those from its files."""
    from omegaconf import OmegaConf

    for key, value in _leaves(OmegaConf.to_container(config), ""):
        if isinstance(value, str) and (changed := hidden(value, environment)) != value:
            OmegaConf.update(config, key, changed)


def _leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        parts = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
    elif isinstance(value, list):
        parts = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    else:
        return [(key, value)]
    # Hydra's own part repeats the command line, from which passwords were removed before.
    return [leaf for name, item in parts if name != "hydra" for leaf in _leaves(item, name)]


def _reference(password: str, environment: MutableMapping[str, str]) -> str:
    number = 1
    while environment.get(f"{PASSWORD_VARIABLE}{number}", password) != password:
        number += 1
    environment[f"{PASSWORD_VARIABLE}{number}"] = password
    return f"${{oc.env:{PASSWORD_VARIABLE}{number}}}"
