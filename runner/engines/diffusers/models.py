"""Load the five networks, and define the sizes of the tiny model's.

A folder is the tiny model's, in diffusers' layout; a file is a published one, which
:mod:`runner.engines.diffusers.published` loads at its published size and in the dtype that
musubi-tuner computes in. Nothing is downloaded: what is missing is a UserError. Every model is
returned in evaluation mode.
Heavy classes are imported inside the functions, from their own modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.errors import UserError
from runner.formats.published_check import check_file
from runner.hub.weights import BYT5_TOKENIZER, QWEN_TOKENIZER

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
        AutoencoderKLHunyuanVideo15,
    )
    from diffusers.models.transformers.transformer_hunyuan_video15 import (
        HunyuanVideo15Transformer3DModel,
    )

TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"

# Real architectures, small sizes. The networks must agree on 32 latent channels, text widths 64 and
# 32, and image width 32.
TINY_TRANSFORMER: dict[str, Any] = {
    "in_channels": 65,  # 32 noisy latents, 32 of the condition, 1 mask
    "out_channels": 32,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 4.0,
    "text_embed_dim": 64,
    "text_embed_2_dim": 32,
    "image_embed_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
TINY_VAE: dict[str, Any] = {
    "latent_channels": 32,
    "block_out_channels": (8, 16, 32, 64, 64),
    "layers_per_block": 1,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
}
TINY_TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,  # the caption's encoding is the third-last hidden state
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # wide enough for captions to differ by more than rounding
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [2, 3, 3],
    },
}
TINY_BYT5: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
}
TINY_IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,  # 16 tokens of 14x14 pixels
    "patch_size": 14,
}


def load_vae(
    path: Path | str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> AutoencoderKLHunyuanVideo15:
    """Load the VAE from a folder (in its stored dtype) or a published file (in float16).

    Raises:
        UserError: files are missing or cannot be loaded.
    """
    if (file := Path(path)).is_file():
        return _published("vae", file, dtype, device)
    folder = _folder(path, "VAE", ("config.json",))
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
        AutoencoderKLHunyuanVideo15,
    )

    vae = _load("VAE", folder, lambda: AutoencoderKLHunyuanVideo15.from_pretrained(
        folder, local_files_only=True, torch_dtype=dtype))  # fmt: skip
    return vae.to(device).eval()


def load_transformer(
    path: Path | str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> HunyuanVideo15Transformer3DModel:
    """Load the transformer from a weights file with Tencent's names and the config.json next to it.

    Args:
        path: the file or its folder. Without a config.json of diffusers' form (Tencent's has
            another) the published size is used, which is the class's default.
        dtype: dtype of the weights; by default as stored.
        device: device to load to.

    Returns:
        The model without gradients; training enables them only for its adapters.

    Raises:
        UserError: files are missing, or keys or shapes differ from the model's.
    """
    model, file = build_transformer(path)
    fill_transformer(model, file, dtype=dtype, device=device)
    return model


def build_transformer(path: Path | str) -> tuple[HunyuanVideo15Transformer3DModel, Path]:
    """Build the transformer without weights.

    Args:
        path: as for :func:`load_transformer`.

    Returns:
        The model, whose parameters have shapes alone, and the file for :func:`fill_transformer`.

    Raises:
        UserError: the file is missing, or is not this model's.
    """
    file = Path(path)
    file = file / TRANSFORMER_FILE if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file}: no transformer weights there; run the weights stage again")
    from runner.engines.diffusers.published import build

    config_file = file.with_name("config.json")
    config = _load("transformer", config_file, lambda: _config(config_file))
    options: dict[str, Any] = {}
    if config.get("_class_name") == "HunyuanVideo15Transformer3DModel":
        options = {key: value for key, value in config.items() if not key.startswith("_")}
    else:
        check_file("transformer", file)
    return _load("transformer", file, lambda: build("transformer", file, **options)), file


def fill_transformer(
    model: HunyuanVideo15Transformer3DModel,
    file: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    on_cpu: Collection[int] = (),
) -> None:
    """Give a transformer its weights.

    Args:
        model: from :func:`build_transformer`, as is ``file``.
        file: the weights.
        dtype: dtype of the weights; by default as stored.
        device: device to load to.
        on_cpu: double blocks whose weights are loaded to the CPU.

    Raises:
        UserError: keys or shapes differ from the model's.
    """
    from runner.engines.diffusers.published import fill

    prefixes = [f"double_blocks.{index}." for index in on_cpu]
    _load("transformer", file, lambda: fill(
        "transformer", model, file, dtype=dtype, device=device, on_cpu=prefixes
    ))  # fmt: skip


def load_text_encoder(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    stream: Callable[[Any], Collection[int]] = lambda _: (),
) -> tuple[Any, Any]:
    """Load tokenizer and Qwen2.5-VL text model.

    Args:
        path: a folder with both, or the published file, whose tokenizer is in the Hugging Face
            cache.
        dtype: dtype of the weights; by default a folder's as stored, a published file's bfloat16.
        device: device to load to.
        stream: chooses, for the model without weights, the layers whose weights are to wait in main
            memory.

    Raises:
        UserError: files are missing or cannot be loaded.
    """
    if (file := Path(path)).is_file():
        from runner.engines.diffusers.published import text_tokenizer

        tokenizer = _load("tokenizer", Path(QWEN_TOKENIZER), text_tokenizer)
        return tokenizer, _load(
            "text encoder", file, lambda: _streamed_text_encoder(file, dtype, device, stream)
        )
    folder = _folder(path, "text encoder", ("config.json", "tokenizer"))
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    tokenizer = _load("tokenizer", folder, lambda: Qwen2Tokenizer.from_pretrained(
        folder / "tokenizer", local_files_only=True, padding_side="right"))  # fmt: skip
    model = _load("text encoder", folder, lambda: Qwen2_5_VLTextModel.from_pretrained(
        folder, local_files_only=True, dtype=dtype or "auto"))  # fmt: skip
    from runner.engines.diffusers.streaming import stream_layers

    model.to(device).eval()
    stream_layers(model.layers, stream(model), device=device)
    return tokenizer, model


def _streamed_text_encoder(
    file: Path, dtype: torch.dtype | None, device: str, stream: Callable[[Any], Collection[int]]
) -> Any:
    from runner.engines.diffusers import published
    from runner.engines.diffusers.streaming import stream_layers

    check_file("text_encoder", file)
    model: Any = published.build("text_encoder", file)
    streamed = stream(model)
    on_cpu = [f"layers.{index}." for index in streamed]
    published.fill("text_encoder", model, file, dtype=dtype, device=device, on_cpu=on_cpu)
    stream_layers(model.layers, streamed, device=device)
    return model


def load_byt5(
    path: Path | str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """Load tokenizer and T5 encoder.

    Args:
        path: a folder with both, or the published file, whose tokenizer is in the Hugging Face
            cache.
        dtype: dtype of the weights; by default a folder's as stored, a published file's float16.
        device: device to load to.

    Raises:
        UserError: files are missing or cannot be loaded.
    """
    if (file := Path(path)).is_file():
        from runner.engines.diffusers.published import byt5_tokenizer

        tokenizer = _load("tokenizer", Path(BYT5_TOKENIZER), byt5_tokenizer)
        return tokenizer, _published("byt5", file, dtype, device)
    folder = _folder(path, "ByT5 encoder", ("config.json", "tokenizer"))
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    tokenizer = _load("tokenizer", folder, lambda: ByT5Tokenizer.from_pretrained(
        folder / "tokenizer", local_files_only=True))  # fmt: skip
    model = _load("ByT5 encoder", folder, lambda: T5EncoderModel.from_pretrained(
        folder, local_files_only=True, dtype=dtype or "auto"))  # fmt: skip
    return tokenizer, model.to(device).eval()


def load_image_encoder(
    path: Path | str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """Load the image processor and the SigLIP vision model from a folder or the published file.

    Raises:
        UserError: files are missing or cannot be loaded.
    """
    if (file := Path(path)).is_file():
        from runner.engines.diffusers.published import image_processor

        return image_processor(), _published("image_encoder", file, dtype, device)
    folder = _folder(path, "image encoder", ("config.json", "preprocessor_config.json"))
    # This processor needs no torchvision, and resizes as the published pipelines do.
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel

    processor = _load("image processor", folder, lambda: SiglipImageProcessorPil.from_pretrained(
        folder, local_files_only=True))  # fmt: skip
    model = _load("image encoder", folder, lambda: SiglipVisionModel.from_pretrained(
        folder, local_files_only=True, dtype=dtype or "auto"))  # fmt: skip
    return processor, model.to(device).eval()


def _published(part: str, file: Path, dtype: torch.dtype | None, device: str) -> Any:
    from runner.engines.diffusers import published

    return _load(
        part.replace("_", " "),
        file,
        lambda: published.load(part, file, dtype=dtype, device=device),
    )


def _folder(path: Path | str, what: str, needs: tuple[str, ...]) -> Path:
    folder = Path(path)
    missing = [name for name in needs if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder}: no {what} there ({missing[0]} is missing); make the weights")
    return folder


def _config(file: Path) -> dict[str, Any]:
    import json

    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError("it holds no JSON object")
    return config


def _load(what: str, path: Path, build: Callable[[], Any]) -> Any:
    from safetensors import SafetensorError

    try:
        return build()
    except (OSError, RuntimeError, TypeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot load the {what}: {reason[0]}") from error
