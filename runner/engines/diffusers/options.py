"""Read and check the trainer's options: musubi-tuner's train.toml.

Sections are flattened, as in musubi-tuner. An option that this engine supports must have the right
type. One that cannot affect the result (worker counts, attention back ends, compilation) is
accepted. An unsupported option that would affect the result is rejected, so no run silently
deviates from its train.toml.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from runner.core.errors import UserError
from runner.formats.dtypes import HALF, LONG, SHORT
from runner.formats.train_options import TABLE, Embedded, TrainOptions
from runner.formats.trainer_options import (
    TRAIN,
    ScriptOption,
    flattened,
    options,
    types_of,
    wrong_value,
)

# Options outside the table that change speed, memory or messages, never the result.
# fmt: off
_IGNORED = frozenset(
    [
        "flash3", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph",
        "cuda_allow_tf32", "cuda_cudnn_benchmark", "dynamo_backend", "log_config",
        "disable_numpy_memmap", "vae_enable_patch_conv", "vae_dtype", "guidance_scale",
        "config_file", "ddp_timeout",
    ]
)
# fmt: on

# Options outside the table that are accepted only if they are switched off.
# fmt: off
_UNSUPPORTED = frozenset(
    [
        "block_swap_ring_size", "img_in_txt_in_offloading", "show_timesteps",
        "no_metadata", "dim_from_weights",
        "scale_weight_norms", "base_weights", "base_weights_multiplier",
        "save_last_n_epochs_state", "save_last_n_steps_state", "save_state_on_train_end",
        "sample_every_n_steps", "log_prefix", "log_tracker_name", "log_tracker_config",
        "wandb_run_name", "wandb_api_key", "huggingface_repo_id", "sage_attn",
    ]
)
# fmt: on

# What this engine does with every known option.
_SUPPORT: dict[str, Embedded] = {
    **{name: option.embedded for name, option in TABLE.items()},
    **dict.fromkeys(_IGNORED, "ignored"),
    **dict.fromkeys(_UNSUPPORTED, "unsupported"),
}
_SWITCHES = {
    name: ScriptOption(name, flag=True) for name, option in TABLE.items() if option.engine_only
}


def read(path: Path | str) -> TrainOptions:
    """Read and check a train.toml.

    Raises:
        UserError: the file cannot be read or parsed, a key is unknown or unsupported, or a value is
            wrong.
    """
    file = Path(path)
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a TOML file ({error})") from None
    return parse(values)


def parse(values: dict[str, Any]) -> TrainOptions:
    """Check the keys and values of a train.toml.

    Raises:
        UserError: a key is missing, unknown or unsupported, or a value is wrong.
    """
    known: dict[str, Any] = {}
    for key, value in flattened(values).items():
        support = _SUPPORT.get(key)
        if support == "supported":
            known[key] = _checked(key, value)
        elif support == "unsupported" and value not in (False, 0, "", []):
            raise UserError(
                f"train.toml: {key}={value!r} is not supported by engine=diffusers; "
                "leave it out, or use engine=musubi"
            )
        elif support is None:
            near = difflib.get_close_matches(key, _SUPPORT, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"train.toml: unknown option {key!r} for engine=diffusers{hint}")
    for option in fields(TrainOptions):
        if option.default is option.default_factory is MISSING and not known.get(option.name):
            raise UserError(f"train.toml: {option.name} is missing")
    train_options = TrainOptions(**known)
    _check(train_options)
    return train_options


def _checked(key: str, value: Any) -> Any:
    option = options(TRAIN)[key] if key in options(TRAIN) else _SWITCHES[key]
    if option.type == "float" and type(value) is int:
        value = float(value)
    wrong = wrong_value(option, value)
    if wrong is None or wrong.what in ("choice", "share"):
        return value
    if option.nargs is not None:
        raise UserError(f"train.toml: {key}={value!r} must be a list of strings")
    names = " or ".join(type_.__name__ for type_ in types_of(option))
    raise UserError(f"train.toml: {key}={value!r} must be of type {names}")


def _check(train_options: TrainOptions) -> None:
    one_of = {
        "task": ("t2v", "i2v"),
        "mixed_precision": ("no", *HALF),
        "dit_dtype": (None, *LONG, *SHORT),
        "save_precision": (None, "float", *reversed(SHORT)),
        "log_with": ("tensorboard",),
        # The other schemes apply only to timestep_sampling=sigma, which is not supported.
        "weighting_scheme": ("none", "logit_normal", "mode"),
    }
    for key, allowed in one_of.items():
        if getattr(train_options, key) not in allowed:
            names = ", ".join(str(value) for value in allowed if value is not None)
            raise UserError(
                f"train.toml: {key}={getattr(train_options, key)!r} is not supported by "
                f"engine=diffusers; use one of {names}"
            )
    at_least_one = [
        "gradient_accumulation_steps",
        "max_train_steps",
        "max_train_epochs",
        "save_every_n_epochs",
        "save_last_n_epochs",
        "save_every_n_steps",
        "sample_every_n_epochs",
    ]
    for key in at_least_one:
        value = getattr(train_options, key)
        if value is not None and value < 1:
            raise UserError(f"train.toml: {key}={value} must be at least 1")
    low = 0 if train_options.min_timestep is None else train_options.min_timestep
    high = 1000 if train_options.max_timestep is None else train_options.max_timestep
    if not 0 <= low < high <= 1000:
        raise UserError(
            f"train.toml: min_timestep={low} and max_timestep={high} are no range in 0..1000"
        )
