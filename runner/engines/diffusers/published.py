"""Load the five published weight files, tensor by tensor, into the libraries' classes.

Nothing is converted on disk and nothing is held twice: a network is built without storage, and
each tensor of the file goes through one buffer, as large as the largest of them, to the device, in
the dtype that musubi-tuner v0.3.4 computes in, and becomes the parameter. The file is not mapped:
a container's memory limit may count mapped pages.

Only parameters are built without storage. Buffers (Qwen2.5-VL's rotary frequencies, SigLIP's
position ids) are in no file; they are computed by the classes and keep their dtype. musubi-tuner
rounds the frequencies to bfloat16; here they stay exact
(``docs/development/full-size-truth.md``).

Sizes are those of musubi-tuner's loaders, which hold the published configs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.errors import UserError
from runner.engines.diffusers import published_names
from runner.formats.dtypes import SAFETENSORS_NAMES, torch_dtype
from runner.formats.published_check import check_file
from runner.formats.safetensors_header import TensorHeader, read_header
from runner.hub.weights import BYT5_TOKENIZER, QWEN_TOKENIZER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# The dtypes that musubi-tuner casts to; a part that is not here keeps the file's.
_DTYPES = {"vae": "float16", "text_encoder": "bfloat16", "byt5": "float16"}
_NAMES: dict[str, published_names.Rename] = {
    "vae": published_names.vae_name,
    "text_encoder": published_names.text_encoder_name,
    "byt5": published_names.byt5_name,
    "image_encoder": published_names.image_encoder_name,
}

_TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
    },
}
_BYT5: dict[str, Any] = {
    "d_model": 1472,
    "d_kv": 64,
    "d_ff": 3584,
    "num_layers": 12,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
}
_IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def load(
    part: str, file: Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> nn.Module:
    """Load a published part in evaluation mode, without gradients.

    Args:
        part: transformer, vae, text_encoder, byt5 or image_encoder.
        file: its weights.
        dtype: dtype of the parameters; by default musubi-tuner's for the part.
        device: device to load to.

    Raises:
        UserError: the file is damaged or not the part's, which is checked before a tensor is read.
    """
    check_file(part, file)
    return fill(part, build(part, file), file, dtype=dtype, device=device)


def build(part: str, file: Path, **sizes: Any) -> nn.Module:
    """Build a part's network with parameters on the meta device and real buffers.

    Args:
        part: transformer, vae, text_encoder, byt5 or image_encoder.
        file: its weights, whose header has the number of ByT5's rows.
        sizes: options of its config that differ from the published ones.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        return _BUILDERS[part](file, sizes)


def fill(
    part: str,
    model: nn.Module,
    file: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    on_cpu: Sequence[str] = (),
) -> nn.Module:
    """Fill a network from :func:`build` with the tensors of a file, one after the other.

    Args:
        part: transformer, vae, text_encoder, byt5 or image_encoder.
        model: the network.
        file: its weights.
        dtype: dtype of the parameters; by default musubi-tuner's for the part.
        device: device to load to.
        on_cpu: beginnings of names (Tencent's for the transformer, else the class's) of parameters
            that are loaded to the CPU all the same.

    Returns:
        The network, in evaluation mode and without gradients.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    import torch

    if dtype is None and part in _DTYPES:
        dtype = getattr(torch, _DTYPES[part])
    headers = {
        name: header
        for name, header in read_header(file).items()
        if part == "transformer" or _NAMES[part](name) is not None
    }

    def place(name: str) -> str:
        own = name if part == "transformer" else str(_NAMES[part](name))
        return "cpu" if own.startswith(tuple(on_cpu)) else device

    for name, tensor in _read_tensors(file, headers, dtype, place):
        for own, value in _renamed(part, name, tensor).items():
            _assign(model, own, value, file)
    if part == "byt5":
        # transformers 5 holds the embedding twice; musubi-tuner's version once.
        model.get_submodule("encoder").embed_tokens = model.get_submodule("shared")
    empty = [name for name, value in model.named_parameters() if value.is_meta]
    if empty:
        raise UserError(f"{file}: no tensor for {empty[0]} ({len(empty)} are missing)")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.requires_grad_(False).eval()


def text_tokenizer() -> Any:
    """Load Qwen2.5-VL's tokenizer from the Hugging Face cache, as musubi-tuner does.

    The weights stage has fetched it and pointed the branch ``main`` at the wanted commit.
    """
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(
        QWEN_TOKENIZER, subfolder="tokenizer", local_files_only=True, padding_side="right"
    )


def byt5_tokenizer() -> Any:
    """Load ByT5's tokenizer from the Hugging Face cache, as musubi-tuner does.

    musubi-tuner adds a token for each colour and font (``<color-3>``), which the wording of
    quoted text never uses; they are left out here.
    """
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

    return ByT5Tokenizer.from_pretrained(BYT5_TOKENIZER, local_files_only=True)


def image_processor() -> Any:
    """Make SigLIP's image processor with the published settings.

    They are those of ``image_encoder``'s feature extractor in FramePack, which musubi-tuner v0.3.4
    copies (``FEATURE_EXTRACTOR_CONFIG``): 384x384, bicubic, to -1..1.
    """
    # This processor needs no torchvision, and resizes as the published pipelines do.
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(
        do_resize=True,
        size={"height": 384, "width": 384},
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _build_transformer(file: Path, sizes: dict[str, Any]) -> nn.Module:
    from diffusers.models.transformers.transformer_hunyuan_video15 import (
        HunyuanVideo15Transformer3DModel,
    )

    # The class's defaults are the published sizes.
    return HunyuanVideo15Transformer3DModel(**sizes)


def _build_vae(file: Path, sizes: dict[str, Any]) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
        AutoencoderKLHunyuanVideo15,
    )

    # The class's defaults are the published sizes.
    return AutoencoderKLHunyuanVideo15(**sizes)


def _build_text_encoder(file: Path, sizes: dict[str, Any]) -> nn.Module:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**{**_TEXT_ENCODER, **sizes}))


def _build_byt5(file: Path, sizes: dict[str, Any]) -> nn.Module:
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    rows = read_header(file)["shared.weight"].shape[0]
    return T5EncoderModel(T5Config(**{**_BYT5, "vocab_size": rows, **sizes}))


def _build_image_encoder(file: Path, sizes: dict[str, Any]) -> nn.Module:
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**{**_IMAGE_ENCODER, **sizes}))


_BUILDERS: dict[str, Callable[[Path, dict[str, Any]], nn.Module]] = {
    "transformer": _build_transformer,
    "vae": _build_vae,
    "text_encoder": _build_text_encoder,
    "byt5": _build_byt5,
    "image_encoder": _build_image_encoder,
}


def _read_tensors(
    file: Path,
    headers: Mapping[str, TensorHeader],
    dtype: torch.dtype | None,
    place: Callable[[str], str],
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one after the other, in the file's order, to a device.

    Args:
        file: the file.
        headers: the tensors to read.
        dtype: the dtype to give them, or None for their own.
        place: gives the device for a name.

    Yields:
        Name and tensor; the tensor is the caller's alone.
    """
    import torch

    size = max((header.end - header.start for header in headers.values()), default=0)
    # From pinned memory a GPU copies several times as fast.
    pinned = any(torch.device(place(name)).type == "cuda" for name in headers)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    with file.open("rb") as opened:
        for name, header in sorted(headers.items(), key=lambda item: item[1].start):
            raw = buffer[: header.end - header.start]
            opened.seek(header.start)
            if opened.readinto(raw.numpy().data) != len(raw):
                raise UserError(f"{file}: it was cut while it was read")
            read = raw.view(torch_dtype(SAFETENSORS_NAMES[header.dtype])).reshape(header.shape)
            placed = read.to(place(name))
            yield name, placed.to(dtype or read.dtype, copy=placed is read)


def _renamed(part: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the class's tensors that one tensor of the file becomes, by name."""
    if part == "transformer":
        from runner.formats.transformer_keys import to_diffusers

        return to_diffusers({name: tensor})
    return {str(_NAMES[part](name)): tensor}


def _assign(model: nn.Module, name: str, tensor: Tensor, file: Path) -> None:
    """Make a tensor the parameter ``name`` of a network."""
    from torch import nn

    module_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        shape = module.get_parameter(leaf).shape
    except AttributeError:
        raise UserError(f"{file}: the network has no place for {name}") from None
    if tensor.shape != shape:
        raise UserError(f"{file}: {name} is {list(tensor.shape)}, not {list(shape)}")
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
