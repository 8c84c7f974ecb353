"""The two digests of a run: of what gave its result, and of what was asked for; pure.

The fingerprint (MLflow's tag ``config.fingerprint``) is equal for runs that must give the same
LoRA, however they were written down: the seed that was drawn, the media, captions and weights by
content, paths absolute. The resume key (``config.resume_key``) is equal for the same command given
again: the seed as asked, media and weights by name. Which code ran, and on what GPU, is in neither:
MLflow has it as ``runner.commit``, ``engine.version`` and ``gpu``.

An option is digested where it differs from its default, so that one that is new changes no digest
of earlier runs while nobody sets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from runner.config.option import Counts
from runner.config.rules import value_of
from runner.config.schema import DatasetConfig, SourceConfig, options
from runner.data.select import SourceOptions, source_options
from runner.engines.base import Engine
from runner.pipeline.model import Inputs, Plan
from runner.storage.store import key_of

# Options that each source may have of its own: they are digested source by source.
_OF_SOURCES = frozenset(
    {f"dataset.{item.name}" for item in fields(SourceConfig)}
    | {"dataset.missing_captions", "dataset.sources"}
)
# The first default of each option whose default has changed since. Left out is what had it: else
# an earlier run and a later one would be equal that differ in it.
FIRST_DEFAULTS: Mapping[str, Any] = {}


def resume_key(inputs: Inputs) -> str:
    """The digest of what was asked for."""
    return _digest(
        {
            **_set(inputs, ("both", "asked")),
            "dataset.sources": _asked_sources(inputs),
        }
    )


def fingerprint(inputs: Inputs, plan: Plan, engine: Engine) -> str | None:
    """The digest of what gives a run's result; None while its weights are not there.

    ``plan`` is that of these inputs: the names of its cached latents and captions say what they
    are made of, the encoders, a VAE tile and fp8 among it.
    """
    weights = inputs.weights.digests
    if weights is None:
        return None
    compiled, _ = engine.compiles(inputs.job, inputs.machine)
    cached = (entry for entry in plan.entries if entry.shelf != "media")
    return _digest(
        {
            **_set(inputs, ("both",)),
            **({"training.compile": True} if compiled else {}),
            "training.seed": inputs.seed,
            "weights": weights,
            "cache": sorted((place, entry.name) for entry in cached for place in entry.links),
            "dataset.sources": [
                (source.options.batch_size, source.options.num_repeats) for source in inputs.sources
            ],
        }
    )


def _digest(made_of: Mapping[str, Any]) -> str:
    return key_of(made_of)[:16]


def _set(inputs: Inputs, which: tuple[Counts, ...]) -> dict[str, Any]:
    """The options among ``which`` that are not at their defaults, by key.

    One that nobody has decided on counts in both digests.
    """
    config, facts = inputs.config, inputs.engine
    found: dict[str, Any] = {}
    for option in options(type(config)):
        key, value = option.key, value_of(config, option.key)
        counted = (option.counts or "both") in which and key not in _OF_SOURCES
        if counted and value != FIRST_DEFAULTS.get(key, option.default):
            found[key] = value
    # These alone are given as typed, and known as absolute.
    located = {"engine.path": facts.source_path, "engine.python": facts.python}
    return found | {key: place for key, place in located.items() if key in found}


def _asked_sources(inputs: Inputs) -> list[dict[str, Any]]:
    """Each source: where it is, and what of its options is not at its default."""
    first = {k.rpartition(".")[2]: v for k, v in FIRST_DEFAULTS.items() if k in _OF_SOURCES}
    default = _flat(source_options(DatasetConfig(**first))[0])
    found: list[dict[str, Any]] = []
    for asked, source in zip(source_options(inputs.config.dataset), inputs.sources, strict=True):
        place: dict[str, Any] = {"kind": source.kind}
        if asked.kind == "hub":
            place = {"kind": "hub", "path": asked.path, "revision": asked.revision}
        elif source.kind != "sample":
            place["path"] = source.path
        changed = {key: value for key, value in _flat(asked).items() if value != default[key]}
        found.append(place | changed)
    return found


def _flat(asked: SourceOptions) -> dict[str, Any]:
    values = asdict(asked)
    for place in ("path", "kind", "revision"):
        del values[place]
    return values | values.pop("extraction")
