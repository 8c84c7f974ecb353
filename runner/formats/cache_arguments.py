"""Arguments given to musubi-tuner's two cache scripts as ``engine.cache_args``; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runner.core.text import did_you_mean
from runner.formats.dtypes import LONG, SHORT
from runner.formats.train_options import SET_BY_RUNNER
from runner.formats.trainer_options import LATENTS, TEXT, is_option, options, parse

# What the runner sets, with the option to use instead.
_OWNED = {
    "dataset_config": "dataset.path and the options of dataset",
    "vae": "model.vae",
    "vae_sample_size": "memory.vae_tile",
    "i2v": "task=i2v",
    "image_encoder": "model.image_encoder",
    "text_encoder": "model.text_encoder",
    "byt5": "model.byt5",
    "fp8_vl": "memory.fp8_text_encoder",
    "keep_cache": SET_BY_RUNNER,
    "skip_existing": "stages.force",
}
_REFUSED = dict.fromkeys(
    ("debug_mode", "console_width", "console_back", "console_num_images"),
    "it shows the dataset instead of encoding it",
)
# They change speed, or where it is computed, which keys leave out.
_SAME_RESULT = frozenset({"batch_size", "num_workers", "device", "disable_cudnn_backend"})


def problems(arguments: Sequence[str]) -> Iterator[str]:
    """Yield one line for each problem with the arguments."""
    known = {**options(LATENTS), **options(TEXT)}
    for name in _names(arguments):
        if name not in known:
            names = [f"--{option}" for option in known]
            yield f"the cache scripts have no option --{name}.{did_you_mean(f'--{name}', names)}"
        elif name in _OWNED:
            yield f"--{name} is set by the runner: use {_OWNED[name]} instead."
        elif name in _REFUSED:
            yield f"--{name} can't be used: {_REFUSED[name]}."
    if arguments and not is_option(arguments[0]):
        yield f"{arguments[0]!r} belongs to no option."
    seen: list[str] = []
    values: dict[str, Any] = {}
    for script in (LATENTS, TEXT):
        read, wrong = parse(script, for_script(script, arguments))
        values |= read
        seen += [line for line in wrong if line not in seen]
    yield from seen
    for name in ("batch_size", "num_workers"):
        if isinstance(values.get(name), int) and values[name] < 1:
            yield f"--{name} {values[name]} is too small: it must be at least 1."
    if values.get("vae_dtype", "float16") not in (*LONG, *SHORT):
        yield f"--vae_dtype can't be {values['vae_dtype']!r}: take float16, bfloat16 or float32."


def for_script(script: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments that the script takes, in their order.

    ``--batch_size`` goes to the latents alone: memory.text_batch_size is that of captions.
    """
    taken = set(options(script)) - ({"batch_size"} if script == TEXT else set())
    kept: list[str] = []
    take = False
    for word in arguments:
        if is_option(word):
            take = _name(word) in taken
        if take:
            kept.append(word)
    return kept


def changing(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values that change what the script encodes, by name, for the keys of the cache."""
    values, _ = parse(script, for_script(script, arguments))
    return {name: value for name, value in sorted(values.items()) if name not in _SAME_RESULT}


def _names(arguments: Sequence[str]) -> list[str]:
    return [_name(word) for word in arguments if is_option(word)]


def _name(word: str) -> str:
    return word.partition("=")[0].removeprefix("--")
