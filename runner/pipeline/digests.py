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
from dataclasses import asdict
from typing import Any, Literal

from runner.config.rules import value_of
from runner.config.schema import DatasetConfig, options
from runner.data.select import SourceOptions, source_options
from runner.engines.base import Engine
from runner.pipeline.model import Inputs, Plan
from runner.storage.shared_cache import json_digest

# both: in either digest as it is set. asked: in the resume key alone; the LoRA does not depend on
# it, or the fingerprint has what became of it. planned: in the fingerprint alone, by what was
# encoded with it. neither: it changes nothing that is learned or kept.
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
    # Names that only label a choice are among them: what it sets counts, however it was set.
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

# Options that each source may have of its own: they are digested source by source.
_OF_SOURCES = frozenset(
    f"dataset.{key}"
    for key in (
        *("kind", "path", "revision", "trigger_word", "default_caption", "missing_captions"),
        *("resolution", "batch_size", "num_repeats", "target_frames", "frame_extraction"),
        *("frame_stride", "frame_sample", "max_frames", "source_fps", "enable_bucket"),
        *("bucket_no_upscale", "sources"),
    )
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
    """The options among ``which`` that are not at their defaults, by key.

    One that nobody has decided on counts in both digests.
    """
    config, facts = inputs.config, inputs.engine
    found: dict[str, Any] = {}
    for option in options(type(config)):
        key, value = option.key, value_of(config, option.key)
        counted = COUNTS.get(key, "both") in which and key not in _OF_SOURCES
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
        place: dict[str, Any] = {"kind": source.source_kind}
        if asked.source_kind == "hub":
            place = {"kind": "hub", "path": asked.path, "revision": asked.revision}
        elif source.source_kind != "sample":
            place["path"] = source.path
        changed = {key: value for key, value in _flat(asked).items() if value != default[key]}
        found.append(place | changed)
    return found


def _flat(asked: SourceOptions) -> dict[str, Any]:
    values = asdict(asked)
    for place in ("path", "source_kind", "revision"):
        del values[place]
    return values | values.pop("extraction")
