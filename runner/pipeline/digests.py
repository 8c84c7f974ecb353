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
from dataclasses import asdict
from typing import Any, Literal

from runner.config.rules import value_of
from runner.config.schema import DatasetConfig, options
from runner.data.select import SourceOptions, source_options
from runner.engines.base import Engine
from runner.pipeline.model import Inputs, Plan
from runner.storage.shared_cache import json_digest

# both: the option's value is in both digests.
# asked: only in the resume key; the LoRA does not depend on it, or the fingerprint has its effect.
# planned: only in the fingerprint, through the keys of the entries encoded with it.
# neither: it changes nothing that is learned or kept.
Counts = Literal["both", "asked", "planned", "neither"]

_COUNTS: Mapping[Counts, str] = {
    "both": """
        task.name engine.name engine.path engine.python engine.extra_args
        network.name network.rank network.alpha network.dropout network.weights network.include
        network.exclude network.args
        optimizer.type optimizer.learning_rate optimizer.args
        scheduler.name scheduler.warmup_steps scheduler.num_cycles scheduler.power
        scheduler.min_lr_ratio
        precision.mixed_precision precision.dit_dtype precision.fp8_base precision.fp8_scaled
        training.epochs training.max_steps training.gradient_accumulation_steps
        training.max_grad_norm training.attention training.timestep_sampling
        training.discrete_flow_shift training.sigmoid_scale training.weighting_scheme
        training.min_timestep training.max_timestep training.resume_from training.save_precision
        training.i2v_unscaled_condition
    """,
    "asked": """
        model.source model.repository model.revision model.transformer model.vae
        model.encoders_repository model.encoders_revision model.qwen_tokenizer_revision
        model.byt5_tokenizer_revision model.text_encoder model.byt5 model.image_encoder
        dataset.kind dataset.path dataset.revision dataset.trigger_word dataset.default_caption
        dataset.missing_captions dataset.resolution dataset.batch_size dataset.num_repeats
        dataset.target_frames dataset.frame_extraction dataset.frame_stride dataset.frame_sample
        dataset.max_frames dataset.source_fps dataset.enable_bucket dataset.bucket_no_upscale
        dataset.validation_fraction dataset.sources
        training.seed training.compile
        training.save_every_epochs training.save_every_steps training.keep_last training.save_state
        sampling.name sampling.prompts sampling.negative_prompt sampling.image_path
        sampling.every_epochs sampling.at_first sampling.width sampling.height sampling.frames
        sampling.steps sampling.guidance_scale sampling.flow_shift sampling.seed
        metadata.title metadata.author metadata.description metadata.license metadata.tags
        metadata.comment
    """,
    "planned": "memory.vae_tile memory.fp8_text_encoder",
    # This includes names that only label a choice: the options that the choice sets count instead.
    "neither": """
        model.name optimizer.name precision.name model.blocks engine.arguments
        dataset.max_archive_gb training.data_workers training.resume
        memory.name memory.blocks_to_swap memory.checkpointing memory.text_batch_size memory.pinned
        memory.h2d_only
        tracking.name tracking.uri tracking.experiment stages.skip stages.force
        name output_dir dry_run
    """,
}
COUNTS: Mapping[str, Counts] = {
    key: counts for counts, keys in _COUNTS.items() for key in keys.split()
}

# Options that each source may set for itself: they are digested for each source.
_OF_SOURCES = frozenset(
    f"dataset.{key}"
    for key in (
        *("kind", "path", "revision", "trigger_word", "default_caption", "missing_captions"),
        *("resolution", "batch_size", "num_repeats", "target_frames", "frame_extraction"),
        *("frame_stride", "frame_sample", "max_frames", "source_fps", "enable_bucket"),
        *("bucket_no_upscale", "sources"),
    )
)
# The first default of each option whose default has changed since. Digests leave out this value and
# not the new default; otherwise earlier and later runs that differ in it would seem equal.
FIRST_DEFAULTS: Mapping[str, Any] = {}


def resume_key(inputs: Inputs) -> str:
    """Return the digest of what was requested."""
    return _digest(
        {
            **_set(inputs, ("both", "asked")),
            "dataset.sources": _asked_sources(inputs),
        }
    )


def fingerprint(inputs: Inputs, plan: Plan, engine: Engine) -> str | None:
    """Return the digest of everything that decides a run's result; None if weights are missing.

    Args:
        inputs: the inputs of the plan.
        plan: the plan of these inputs. The keys of its latents and captions are digests of their
            cache inputs, among them the encoders, the VAE tile and fp8.
        engine: the run's engine.
    """
    weights = inputs.weights.digests
    if weights is None:
        return None
    compiled, _ = engine.compiles(inputs.job, inputs.gpu)
    cached = (entry for entry in plan.entries if entry.namespace != "media")
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


def _digest(cache_inputs: Mapping[str, Any]) -> str:
    return json_digest(cache_inputs)[:16]


def _set(inputs: Inputs, which: tuple[Counts, ...]) -> dict[str, Any]:
    """Return the options among ``which`` that differ from their defaults, by key.

    An option without a row in the table counts in both digests.
    """
    config, install = inputs.config, inputs.engine
    changed: dict[str, Any] = {}
    for option in options(type(config)):
        key, value = option.key, value_of(config, option.key)
        counted = COUNTS.get(key, "both") in which and key not in _OF_SOURCES
        if counted and value != FIRST_DEFAULTS.get(key, option.default):
            changed[key] = value
    # Only these are not yet absolute in the config.
    located = {"engine.path": install.source_path, "engine.python": install.python}
    return changed | {key: path for key, path in located.items() if key in changed}


def _asked_sources(inputs: Inputs) -> list[dict[str, Any]]:
    """Return the place of each source, and its options that differ from the defaults."""
    first = {k.rpartition(".")[2]: v for k, v in FIRST_DEFAULTS.items() if k in _OF_SOURCES}
    default = _flat(source_options(DatasetConfig(**first))[0])
    result: list[dict[str, Any]] = []
    for asked, source in zip(source_options(inputs.config.dataset), inputs.sources, strict=True):
        place: dict[str, Any] = {"kind": source.source_kind}
        if asked.source_kind == "hub":
            place = {"kind": "hub", "path": asked.path, "revision": asked.revision}
        elif source.source_kind != "sample":
            place["path"] = source.path
        changed = {key: value for key, value in _flat(asked).items() if value != default[key]}
        result.append(place | changed)
    return result


def _flat(asked: SourceOptions) -> dict[str, Any]:
    values = asdict(asked)
    for place in ("path", "source_kind", "revision"):
        del values[place]
    return values | values.pop("extraction")
