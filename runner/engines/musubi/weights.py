"""Locate the weights that musubi-tuner trains on, and check those that are not from the hub."""

from __future__ import annotations

from pathlib import Path

from runner.config.schema import PrecisionConfig, RunConfig
from runner.core.errors import UserError
from runner.formats.safetensors_header import read_header
from runner.hub.weights import LocatedWeights, published_weights

# The tensors that musubi-tuner takes the transformer's dtype from: Tencent's, then Comfy-Org's.
_DTYPE_OF = ("double_blocks.0.img_attn_k.weight", "double_blocks.0.img_attn_qkv.weight")


def model_weights(config: RunConfig, root: Path) -> LocatedWeights:
    """Locate the weights of the config's model, present or not; reads only.

    Raises:
        UserError: a local file is damaged, not this model's, or not for the run's precision.
    """
    located = published_weights(config, root, whole=True)
    for file in located.local:
        if file.part == "transformer" and _is_half(file.path) and not takes_half(config.precision):
            raise UserError(
                f"model.transformer={file.path} holds fp16 weights, which can't be trained in "
                f"precision={config.precision.name}: take precision=fp16, or a bf16 file."
            )
    return located


def takes_half(precision: PrecisionConfig) -> bool:
    """Whether musubi-tuner trains fp16 weights in this precision; in another it refuses them."""
    return precision.mixed_precision == "fp16" and precision.dit_dtype in (None, "float16")


def _is_half(transformer: Path) -> bool:
    header = read_header(transformer)
    return next(header[name].dtype for name in _DTYPE_OF if name in header) == "F16"
