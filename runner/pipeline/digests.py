"""The two digests of a run: of everything that decides its result, and of the request; pure.

The fingerprint (MLflow's tag ``config.fingerprint``) is equal for runs that must give the same
LoRA, however they were requested: it has the seed that was drawn, media, captions and weights by
content, and absolute paths. The resume key (``config.resume_key``) is equal when the same command
is given again: it has the seed as requested, and media and weights by name. The version of the code
and the GPU are in neither; MLflow has them as ``runner.commit``, ``engine.version`` and ``gpu``.

Only options that differ from their defaults are digested, so that a new option does not change the
digests of earlier runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from runner.config.dataset_schema import DatasetConfig, SourceConfig
from runner.config.option import Digests
from runner.config.rules import value_of
from runner.config.schema import options
from runner.data.source_options import SourceOptions, source_options
from runner.engines.base import Engine
from runner.pipeline.model import Inputs, Plan
from runner.storage.shared_cache import cache_key, json_digest

# Options that each source may set for itself: they are digested for each source.
_OF_SOURCES = frozenset(
    {f"dataset.{item.name}" for item in fields(SourceConfig)}
    | {"dataset.missing_captions", "dataset.sources"}
)
# The first default of each option whose default has changed since. Digests leave out this value and
# not the new default; otherwise earlier and later runs that differ in it would seem equal. Those
# of a single engine are its ``first_defaults``.
FIRST_DEFAULTS: Mapping[str, Any] = {}


def resume_key(inputs: Inputs, engine: Engine) -> str:
    """Return the digest of what was requested."""
    return _digest(
        {
            **_set(inputs, engine, ("both", "resume_key")),
            "dataset.sources": _asked_sources(inputs),
        }
    )


def fingerprint(inputs: Inputs, plan: Plan, engine: Engine) -> str | None:
    """Return the digest of everything that decides a run's result; None if weights are missing.

    Args:
        inputs: the inputs of the plan.
        plan: the plan of these inputs. The cache inputs of its latents and captions have, among
            others, the encoders, the VAE tile and fp8.
        engine: the run's engine. It counts in place of the engine that encoded an entry, so that
            runs have the fingerprints that they had when each engine encoded for itself.
    """
    weights = inputs.weights.digests
    if weights is None:
        return None
    compiled, _ = engine.compiles(inputs.job, inputs.gpu)
    encoding = {"engine": inputs.own_encoding or engine.name}
    cached = (entry for entry in plan.entries if entry.namespace != "media")
    return _digest(
        {
            **_set(inputs, engine, ("both",)),
            **({"training.compile": True} if compiled else {}),
            "training.seed": inputs.seed,
            "weights": weights,
            "cache": sorted(
                (path, cache_key(entry.cache_inputs | encoding))
                for entry in cached
                for path in entry.links
            ),
            "dataset.sources": [
                (source.options.batch_size, source.options.num_repeats) for source in inputs.sources
            ],
        }
    )


def _digest(cache_inputs: Mapping[str, Any]) -> str:
    return json_digest(cache_inputs)[:16]


def _set(inputs: Inputs, engine: Engine, which: tuple[Digests, ...]) -> dict[str, Any]:
    """Return the options among ``which`` that differ from their defaults, by key.

    An option without a row in the table counts in both digests.
    """
    config, install = inputs.config, inputs.engine
    first = {**FIRST_DEFAULTS, **engine.first_defaults(config)}
    changed: dict[str, Any] = {}
    for option in options(type(config)):
        key, value = option.key, value_of(config, option.key)
        counted = (option.digests or "both") in which and key not in _OF_SOURCES
        if counted and value != first.get(key, option.default):
            changed[key] = value
    # Only these are not yet absolute in the config.
    located = {"engine.path": install.source_path, "engine.python": install.python}
    return changed | {key: path for key, path in located.items() if key in changed}


def _asked_sources(inputs: Inputs) -> list[dict[str, Any]]:
    """Return where each source is, and its options that differ from the defaults."""
    first = {k.rpartition(".")[2]: v for k, v in FIRST_DEFAULTS.items() if k in _OF_SOURCES}
    default = _flat(source_options(DatasetConfig(**first))[0])
    result: list[dict[str, Any]] = []
    for asked, source in zip(source_options(inputs.config.dataset), inputs.sources, strict=True):
        location: dict[str, Any] = {"kind": source.source_kind}
        if asked.source_kind == "hub":
            location = {"kind": "hub", "path": asked.path, "revision": asked.revision}
        elif source.source_kind != "sample":
            location["path"] = source.path
        changed = {key: value for key, value in _flat(asked).items() if value != default[key]}
        result.append(location | changed)
    return result


def _flat(asked: SourceOptions) -> dict[str, Any]:
    values = asdict(asked)
    for key in ("path", "source_kind", "revision"):
        del values[key]
    return values | values.pop("extraction")
