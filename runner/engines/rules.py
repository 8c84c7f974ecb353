"""Rules on train.toml, dataset.toml and the prompts that the engines share; pure.

Each engine's own rules include these and add to them. Rules that hold for every possible engine are
in :mod:`runner.config.rules`, which cannot import the formats that these need.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from runner.config.schema import RunConfig
from runner.core.text import did_you_mean
from runner.engines import rules_optimizer
from runner.engines.optimizer_classes import class_name, finds_its_rate, ignores_learning_rate
from runner.formats.dtypes import LONG
from runner.formats.transformer_keys import BLOCK_LINEARS

_DROPOUTS = ("rank_dropout", "module_dropout")
NETWORK_ARGS = {
    "lora": (*_DROPOUTS, "loraplus_lr_ratio"),
    "loha": _DROPOUTS,
    "lokr": (*_DROPOUTS, "factor"),
}


def problems(config: RunConfig, *, more_network_args: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield one line for each shared rule that ``config`` breaks.

    Args:
        config: the run's config.
        more_network_args: network arguments that the engine knows in addition to the usual ones.
    """
    yield from rules_optimizer.problems(config)
    yield from _precision(config)
    yield from _network(config)
    yield from _network_args(config, more_network_args)
    yield from _previews(config)


def plan_problems(config: RunConfig, *, steps: int) -> Iterator[str]:
    """Yield one line for each broken shared rule that depends on the number of steps."""
    return rules_optimizer.plan_problems(config, steps=steps)


def datasets(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield each source of media with its option key: ``dataset`` itself if it lists none."""
    if not config.dataset.sources:
        yield "dataset", config.dataset
    for number, source in enumerate(config.dataset.sources):
        yield f"dataset.sources[{number}]", source


def own(source: Any, dataset: Any, key: str) -> Any:
    """Return an option of a source, or the dataset's value if the source does not set it."""
    value = getattr(source, key)
    return getattr(dataset, key) if value is None else value


def _precision(config: RunConfig) -> Iterator[str]:
    dtype, tile = config.precision.dit_dtype, config.memory.vae_tile
    if dtype is not None and dtype not in LONG:
        yield f"precision.dit_dtype={dtype} is not a choice.{did_you_mean(dtype, LONG)}"
    if tile and tile % 64:
        # Tiles overlap by a quarter, and a latent is 16 pixels wide.
        near = max(64, round(tile / 64) * 64)
        yield (
            f"memory.vae_tile={tile} must be a multiple of 64 (nearest: {near}), or 0 for whole "
            "frames."
        )


def _network(config: RunConfig) -> Iterator[str]:
    network = config.network
    try:
        trained = trained_modules(config)
    except re.error:
        return  # Reported by the rules of runner.config.rules.
    if network.include and not network.exclude:
        yield (
            "network.include does nothing alone, it adds back what network.exclude leaves out: "
            "add 'network.exclude=[\".*\"]' to train just those."
        )
    if not trained:
        yield (
            "network.exclude leaves nothing to train: patterns match whole names such as "
            "double_blocks.0.img_mod.linear; add some back with network.include."
        )


def trained_modules(config: RunConfig) -> list[str]:
    """Return Tencent's names of the modules that the config trains, in the model's order.

    Raises:
        re.error: a pattern is no regular expression.
    """
    network = config.network
    include = [re.compile(pattern) for pattern in network.include]
    exclude = [re.compile(pattern) for pattern in network.exclude]
    names = [f"double_blocks.{n}.{m}" for n in range(config.model.blocks) for m in BLOCK_LINEARS]
    return [
        name
        for name in names
        if any(p.fullmatch(name) for p in include) or not any(p.fullmatch(name) for p in exclude)
    ]


def _network_args(config: RunConfig, more: tuple[str, ...]) -> Iterator[str]:
    network = config.network
    known = (*NETWORK_ARGS.get(network.name, ()), *more)
    for key, value in network.args.items():
        if key in ("include_patterns", "exclude_patterns"):
            yield f"network.args.{key}: set network.{key.removesuffix('_patterns')} instead."
        elif key not in known:
            yield f"network={network.name} has no argument {key}.{did_you_mean(key, known)}"
        elif key in _DROPOUTS:
            if not _number(value) or not 0 <= value < 1:
                yield f"network.args.{key}={value} must be at least 0 and below 1."
        elif key == "loraplus_lr_ratio":
            yield from _loraplus(config, value)
        elif key == "factor" and (
            not isinstance(value, int) or isinstance(value, bool) or value < -1 or value == 0
        ):
            yield f"network.args.factor={value} must be -1 or a whole number above 0."


def _loraplus(config: RunConfig, ratio: Any) -> Iterator[str]:
    optimizer = config.optimizer.type
    if not _number(ratio) or not ratio > 0:
        yield f"network.args.loraplus_lr_ratio={ratio} must be a number above 0."
    elif ratio != 1 and finds_its_rate(optimizer):
        yield (
            f"network.args.loraplus_lr_ratio={ratio} makes two learning rates, and "
            f"{class_name(optimizer)} takes one: leave it out, or take another optimizer."
        )
    elif ratio != 1 and ignores_learning_rate(config.optimizer):
        yield (
            f"network.args.loraplus_lr_ratio={ratio} does nothing with Adafactor's relative_step, "
            "which sets its own rate: leave it out, or take optimizer.args.relative_step=false "
            "and optimizer.args.warmup_init=false."
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _previews(config: RunConfig) -> Iterator[str]:
    """Find prompts that would be misread in the prompt file: one per line, options after it."""
    sampling = config.sampling
    if sampling.name != "prompts":
        return
    texts = [(f"sampling.prompts[{n}]", text) for n, text in enumerate(sampling.prompts)]
    for key, text in [*texts, ("sampling.negative_prompt", sampling.negative_prompt)]:
        yield from _preview_text(key, text)
    for key, text in texts:
        if not text.strip():
            yield f"{key} is empty."
        elif text.startswith("#"):
            yield f"{key} begins with #, and would be skipped as a comment."
    path = sampling.image_path
    if path is not None:
        yield from _preview_text("sampling.image_path", path)
        if path != path.strip():
            yield f"sampling.image_path={path!r} begins or ends with a space: rename the file."
    for key in ("guidance_scale", "flow_shift"):
        value = getattr(sampling, key)
        # musubi-tuner's prompt lines know neither signs nor exponents in numbers.
        if not 0.01 <= value <= 1000:
            yield f"sampling.{key}={value:g} must be between 0.01 and 1000."


def _preview_text(key: str, text: str) -> Iterator[str]:
    if " --" in text:
        yield f"{key} has ' --' in it, where the trainer would read an option: leave it out."
    if "\n" in text or "\r" in text:
        yield f"{key} has a line break, where the trainer would begin another prompt."
