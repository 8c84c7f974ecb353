"""The trainer's options: musubi-tuner's train.toml, checked.

Sections are flattened as musubi does. A key this engine acts on must have the right type; one that
changes nothing here (worker counts, attention back ends, compilation) is accepted; one that would
have to change something and cannot is refused by name, so that no run silently differs from what
its file says.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from runner.core.errors import UserError

# They change speed, memory or messages, never what is learnt.
# fmt: off
HARMLESS = frozenset(
    [
        "sdpa", "flash_attn", "flash3", "xformers", "split_attn", "compile", "compile_backend",
        "compile_mode", "compile_dynamic", "compile_fullgraph", "compile_cache_size_limit",
        "cuda_allow_tf32", "cuda_cudnn_benchmark", "dynamo_backend",
        "max_data_loader_n_workers", "persistent_data_loader_workers", "log_config",
        "disable_numpy_memmap", "fp8_vl", "vae_sample_size", "vae_enable_patch_conv",
        "vae_dtype", "guidance_scale", "logit_mean", "logit_std", "mode_scale",
        "lr_decay_steps", "config_file", "ddp_timeout",
    ]
)
# fmt: on

# Accepted as long as they are switched off.
# fmt: off
OFF_ONLY = frozenset(
    [
        "fp8_base", "fp8_scaled", "blocks_to_swap", "use_pinned_memory_for_block_swap",
        "block_swap_h2d_only", "block_swap_ring_size", "img_in_txt_in_offloading",
        "gradient_checkpointing_cpu_offload", "preserve_distribution_shape",
        "num_timestep_buckets", "show_timesteps", "no_metadata",
        "dim_from_weights", "scale_weight_norms", "base_weights", "base_weights_multiplier",
        "resume", "save_last_n_epochs_state",
        "save_last_n_steps_state", "save_state", "save_state_on_train_end",
        "sample_every_n_steps", "log_prefix", "log_tracker_name", "log_tracker_config",
        "wandb_run_name", "wandb_api_key", "huggingface_repo_id", "sage_attn",
    ]
)
# fmt: on


@dataclass(frozen=True)
class TrainOptions:
    """What the trainer acts on, under musubi's names and with its defaults.

    `i2v_unscaled_condition` is this engine's own: leave the first frame's latent unscaled, as
    musubi does in training, where the published pipelines scale it.
    """

    dit: str
    dataset_config: str
    output_dir: str
    output_name: str
    vae: str | None = None
    text_encoder: str | None = None
    byt5: str | None = None
    image_encoder: str | None = None
    task: str = "t2v"
    dit_dtype: str | None = None
    mixed_precision: str = "no"
    timestep_sampling: str = "sigma"
    discrete_flow_shift: float = 1.0
    sigmoid_scale: float = 1.0
    min_timestep: int | None = None
    max_timestep: int | None = None
    weighting_scheme: str = "none"
    optimizer_type: str = ""
    optimizer_args: list[str] = field(default_factory=list)
    learning_rate: float = 2e-6
    max_grad_norm: float = 1.0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int | float = 0
    lr_scheduler_num_cycles: int = 1
    lr_scheduler_power: float = 1.0
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None
    lr_scheduler_type: str = ""
    lr_scheduler_args: list[str] = field(default_factory=list)
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    network_module: str = ""
    network_dim: int | None = None
    network_alpha: float = 1.0
    network_dropout: float | None = None
    network_args: list[str] = field(default_factory=list)
    network_weights: str | None = None
    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    seed: int | None = None
    save_every_n_epochs: int | None = None
    save_last_n_epochs: int | None = None
    save_every_n_steps: int | None = None
    save_last_n_steps: int | None = None
    save_precision: str | None = None
    logging_dir: str | None = None
    log_with: str = "tensorboard"
    sample_prompts: str | None = None
    sample_every_n_epochs: int | None = None
    sample_at_first: bool = False
    training_comment: str | None = None
    metadata_title: str | None = None
    metadata_author: str | None = None
    metadata_description: str | None = None
    metadata_license: str | None = None
    metadata_tags: str | None = None
    i2v_unscaled_condition: bool = False

    def __post_init__(self) -> None:
        one_of = {
            "task": ("t2v", "i2v"),
            "mixed_precision": ("no", "bf16", "fp16"),
            "dit_dtype": (None, "bfloat16", "float16", "float32", "bf16", "fp16", "fp32"),
            "save_precision": (None, "float", "fp32", "fp16", "bf16"),
            "log_with": ("tensorboard",),
            # The other schemes weigh only sampled sigmas, and no supported sampling draws those.
            "weighting_scheme": ("none", "logit_normal", "mode"),
        }
        for key, allowed in one_of.items():
            if getattr(self, key) not in allowed:
                names = ", ".join(str(value) for value in allowed if value is not None)
                raise UserError(
                    f"train.toml: {key}={getattr(self, key)!r} is not supported by "
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
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"train.toml: {key}={value} must be at least 1")
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        if not 0 <= low < high <= 1000:
            raise UserError(
                f"train.toml: min_timestep={low} and max_timestep={high} are no range in 0..1000"
            )


def read(path: Path | str) -> TrainOptions:
    """Read and check a train.toml.

    Raises:
        UserError: no such file, broken TOML, an unknown key, a wrong type or value, or a key that
            this engine cannot honour.
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
    """TrainOptions from the keys and values of a train.toml; raises UserError as `read` does."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    types = get_type_hints(TrainOptions)
    known: dict[str, Any] = {}
    for key, value in flat.items():
        if key in types:
            known[key] = _checked(key, value, types[key])
        elif key in OFF_ONLY:
            if value not in (False, 0, "", []):
                raise UserError(
                    f"train.toml: {key}={value!r} is not supported by engine=diffusers; "
                    "leave it out, or use engine=musubi"
                )
        elif key not in HARMLESS:
            near = difflib.get_close_matches(key, [*types, *HARMLESS, *OFF_ONLY], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"train.toml: unknown option {key!r} for engine=diffusers{hint}")
    for option in fields(TrainOptions)[:4]:
        if not known.get(option.name):
            raise UserError(f"train.toml: {option.name} is missing")
    return TrainOptions(**known)


def _checked(key: str, value: Any, wanted: Any) -> Any:
    if get_origin(wanted) is list:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return value
        raise UserError(f"train.toml: {key}={value!r} must be a list of strings")
    kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
    raise UserError(f"train.toml: {key}={value!r} must be of type {names}")
