"""Check ``engine.extra_args`` and ``engine.cache_args``; pure.

They give options that musubi-tuner has and the runner does not set.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from typing import Any

from runner.config.schema import RunConfig
from runner.formats.cache_arguments import problems as cache_problems
from runner.formats.dtypes import LONG, SHORT
from runner.formats.train_options import SET_BY_RUNNER, TABLE
from runner.formats.trainer_options import TRAIN, parse

# Options of the trainer that the runner sets, with the runner's option to use instead.
OWNED = {
    **{
        name: option.set_by
        for name, option in TABLE.items()
        if option.set_by is not None and not option.engine_only
    },
    "config_file": SET_BY_RUNNER,
    "resume_from_huggingface": TABLE["resume"].set_by,
}

# Options that end the run or are not meant for training this model.
REFUSED = {
    "dim_from_weights": "it crashes; set network.rank to the file's rank",
    "flash3": "it is ignored beside the runner's own training.attention",
    "sage_attn": "musubi-tuner refuses it in training",
    "show_timesteps": "it ends the trainer before training",
}

# Counts that musubi-tuner divides by, or that make no sense below one.
_AT_LEAST_ONE = (
    *("block_swap_ring_size", "sample_every_n_steps", "compile_cache_size_limit"),
    *("save_last_n_epochs_state", "save_last_n_steps_state"),
)


def extra_arguments(config: RunConfig) -> Iterator[str]:
    """Yield one line for each problem with ``engine.extra_args``."""
    values, problems = parse(TRAIN, list(config.engine.extra_args))
    for problem in problems:
        yield f"engine.extra_args: {problem}"
    for name in values:
        if name in OWNED:
            yield f"engine.extra_args: --{name} is set by the runner: use {OWNED[name]} instead."
        elif name in REFUSED:
            yield f"engine.extra_args: --{name} can't be used: {REFUSED[name]}."
    if not problems:
        for problem in _values(values):
            yield f"engine.extra_args: {problem}"


def cache_arguments(config: RunConfig) -> Iterator[str]:
    """Yield one line for each problem with ``engine.cache_args``."""
    for problem in cache_problems(config.engine.cache_args):
        yield f"engine.cache_args: {problem}"


def gives(config: RunConfig, name: str) -> bool:
    """Return whether ``engine.extra_args`` contains the option, named without dashes."""
    return name in parse(TRAIN, list(config.engine.extra_args))[0]


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _values(values: dict[str, Any]) -> Iterator[str]:
    for name in _AT_LEAST_ONE:
        if name in values and values[name] < 1:
            yield f"--{name} {values[name]} is too small: it must be at least 1."
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"--{name} {number} must be finite."
    for pair in values.get("lr_scheduler_args", []):
        if pair.count("=") != 1:
            yield f"--lr_scheduler_args {pair!r} must be KEY=VALUE with one equals sign."
        elif not _is_literal(pair.partition("=")[2]):
            yield (
                f"--lr_scheduler_args {pair!r}: musubi-tuner reads the value as Python, and it "
                "must be a number, a list, True, False, None or a text in quotes."
            )
    if values.get("vae_dtype", "float16") not in (*LONG, *SHORT):
        yield f"--vae_dtype can't be {values['vae_dtype']!r}: take float16, bfloat16 or float32."
    if "huggingface_repo_id" not in values:
        for name in ("save_state_to_huggingface", "async_upload"):
            if name in values:
                yield f"--{name} needs --huggingface_repo_id."
