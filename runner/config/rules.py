"""Rules on single options and on combinations, checked before anything else; pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from runner.config import colours
from runner.config.colours import hex_colour
from runner.config.dataset_schema import SourceConfig
from runner.config.latent_frames import nearest_frames, valid_frames
from runner.config.option import Bounds, Option
from runner.config.schema import RunConfig, options
from runner.core.text import did_you_mean, is_text_encoding


def problems(config: RunConfig) -> Iterator[str]:
    """Yield one line for each broken rule, of those that hold for all engines."""
    for rule in (_choices, _texts, _media, _numbers, _frames, _combinations):
        yield from rule(config)


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _values(config: RunConfig) -> Iterator[tuple[Option, str, Any]]:
    """Yield every option with its key and value, then the values that sources set themselves."""
    for option in options():
        yield option, option.key, value_of(config, option.key)
        group, _, name = option.key.rpartition(".")
        for n, source in enumerate(config.dataset.sources if group == "dataset" else []):
            yield option, f"dataset.sources[{n}].{name}", getattr(source, name, None)


def _choices(config: RunConfig) -> Iterator[str]:
    for option, key, value in _values(config):
        if option.choices:
            yield from _choice(key, value, option.choices)


def _choice(key: str, value: Any, choices: tuple[str, ...]) -> Iterator[str]:
    if value is not None and value not in choices:
        yield f"{key}={value} is not a choice.{did_you_mean(str(value), choices)}"


# Those that captions are likely to be in; Python knows more.
_ENCODINGS = (
    "cp1252", "cp1250", "cp1251", "koi8-r", "cp932", "cp936", "cp949", "cp950", "big5", "utf-16-le",
    "utf-8",
)  # fmt: skip
_SECRET_FLAG = re.compile(r"-+\w*(token|password|secret|api_key)\b", re.IGNORECASE)


def _texts(config: RunConfig) -> Iterator[str]:
    name = config.name
    if name is not None and (not name.strip(". ") or set(name) & set("/\\\0\n")):
        yield f"name={name!r} can't be a folder's name: leave out / and \\."
    for option, key, value in _values(config):
        if option.key == "dataset.encoding" and value and not is_text_encoding(value):
            yield f"{key}={value} is not an encoding.{did_you_mean(value, _ENCODINGS)}"
    for key in ("include", "exclude"):
        for pattern in getattr(config.network, key):
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"network.{key}: {pattern!r} is not a regular expression: {error}."
    for argument in config.engine.extra_args:
        secret = _SECRET_FLAG.match(argument)
        if secret:
            yield (
                f"engine.extra_args holds {secret.group(0)}: a secret on a command line can be "
                "read by others. Set it in the environment, for example HF_TOKEN."
            )


def _media(config: RunConfig) -> Iterator[str]:
    dataset = config.dataset
    for key, fps in [
        ("dataset.fps", dataset.fps),
        *((f"dataset.sources[{n}].fps", source.fps) for n, source in enumerate(dataset.sources)),
    ]:
        if fps not in (None, "auto", "native") and not _is_rate(fps):
            yield f"{key}={fps} must be auto, native or a number of frames per second."
    if hex_colour(dataset.background) is None:
        yield (
            f"dataset.background={dataset.background} is not a colour: give one of "
            f"{', '.join(colours.NAMES)}, or '#rrggbb' in quotes."
        )


def _is_rate(text: str | None) -> bool:
    try:
        return 0.1 <= float(text or "") <= 1000
    except ValueError:
        return False


def _numbers(config: RunConfig) -> Iterator[str]:
    for option, key, value in _values(config):
        if value is not None:
            yield from _out_of_bounds(option.bounds, key, value)
    low, high = config.training.min_timestep, config.training.max_timestep
    if not 0 <= (low or 0) < (1000 if high is None else high) <= 1000:
        yield (
            f"training.min_timestep={low} and training.max_timestep={high} must satisfy "
            "0 <= min < max <= 1000."
        )


def _out_of_bounds(bounds: Bounds, key: str, value: Any) -> Iterator[str]:
    low, below = bounds.at_least, bounds.below
    if bounds.above is not None and not (value > bounds.above and math.isfinite(value)):
        yield f"{key}={value} must be a number above {bounds.above:g}."
    elif low is not None and below is not None and isinstance(value, float):
        if not low <= value < below:
            yield f"{key}={value} must be at least {low:g} and below {below:g}."
    elif low is not None and not math.isfinite(value):
        yield f"{key}={value} must be a number, at least {low:g}."
    elif low is not None and value < low:
        yield f"{key}={value} is too small: it must be at least {low:g}."
    elif below is not None and value >= below:
        yield f"{key}={value} must be below {below}."


def _resolution(key: str, resolution: list[int] | None) -> Iterator[str]:
    if resolution is None:
        return
    if len(resolution) != 2:
        yield f"{key}={resolution} must be two numbers, width and height."
        return
    for side in resolution:
        if side < 32 or side % 16:
            near = max(32, round(side / 16) * 16)
            yield f"{key}={resolution}: {side} is not a multiple of 16 (nearest: {near})."


def _target_frames(key: str, values: list[int] | None) -> Iterator[str]:
    if values is None:
        return
    if not values:
        yield f"{key} is empty: name at least one frame count, for example [1,13,25]."
    for frames in values:
        if frames < 1 or frames != valid_frames(frames):
            below, above = nearest_frames(frames)
            yield f"{key}: {frames} is not of the form 4N+1 (nearest: {below} or {above})."


def _frames(config: RunConfig) -> Iterator[str]:
    parts: list[tuple[str, Any]] = [("dataset", config.dataset)]
    parts += [(f"dataset.sources[{n}]", s) for n, s in enumerate(config.dataset.sources)]
    for key, part in parts:
        yield from _resolution(f"{key}.resolution", part.resolution)
        yield from _target_frames(f"{key}.target_frames", part.target_frames)
        extraction = part.frame_extraction or config.dataset.frame_extraction
        targets = part.target_frames or config.dataset.target_frames
        if extraction == "chunk" and 1 in targets:
            yield (
                f"{key}.target_frames has a 1, and frame_extraction=chunk would make an item of "
                f"every single frame: leave the 1 out, for example {key}.target_frames=[13,25]."
            )
    for n, source in enumerate(config.dataset.sources):
        if not source.path and source.kind != "sample":
            yield f"dataset.sources[{n}] has no path."
    yield from _regularisation(config)
    if config.sampling.name == "prompts":
        yield from _resolution("sampling.width/height", _preview_size(config))
        yield from _target_frames("sampling.frames", [config.sampling.frames])
        if not config.sampling.prompts:
            yield "sampling=prompts needs sampling.prompts, for example [a cat on a roof]."
        if config.task.name == "i2v" and not config.sampling.image_path:
            yield "sampling=prompts with task=i2v needs sampling.image_path, the first frame."


_WEIGHT = next(option for option in options(SourceConfig) if option.key == "weight")


def _regularisation(config: RunConfig) -> Iterator[str]:
    sources = config.dataset.sources
    for n, source in enumerate(sources):
        key = f"dataset.sources[{n}]"
        if source.weight is not None and not source.regularisation:
            yield (
                f"{key}.weight is for regularisation sets: add regularisation: true, or take "
                "num_repeats."
            )
        if source.regularisation and source.num_repeats is not None:
            yield f"{key}: regularisation sets get their repeats from weight: drop num_repeats."
        if source.weight is not None:
            yield from _out_of_bounds(_WEIGHT.bounds, f"{key}.weight", source.weight)
    if sources and all(source.regularisation for source in sources):
        yield "dataset.sources holds regularisation sets only: add what is to be learned."


def _preview_size(config: RunConfig) -> list[int]:
    return [config.sampling.width, config.sampling.height]


def _combinations(config: RunConfig) -> Iterator[str]:
    model = config.model
    if config.precision.fp8_scaled and not config.precision.fp8_base:
        yield "precision.fp8_scaled=true needs precision.fp8_base=true."
    maximum = model.blocks - 3
    if (config.memory.blocks_to_swap or 0) > maximum and model.source == "hub":
        yield (
            f"memory.blocks_to_swap={config.memory.blocks_to_swap} is too many: the network has "
            f"{model.blocks} blocks and at most {maximum} can be swapped."
        )
    if config.scheduler.warmup_steps and config.scheduler.name == "constant":
        yield (
            "scheduler=constant has no warm-up: take scheduler=constant_with_warmup, or "
            "scheduler.warmup_steps=0."
        )
    if config.tracking.name == "none" and config.tracking.uri:
        yield "tracking.uri is set but tracking=none: take tracking=server."
