"""Latent and text cache files: names, keys, dtypes and metadata of musubi-tuner v0.3.4.

A file's name contains what training needs to sort it into a bucket (item, crop, size), its keys
contain shape and dtype, and its metadata the size in pixels or the caption. Every write is atomic.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.atomic import write_bytes
from runner.core.errors import StageError, UserError
from runner.formats.frames import Crop

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from runner.formats.bucket import Size

ARCHITECTURE = "hunyuan_video_1_5"
FORMAT_VERSION = "1.0.1"
LATENTS_SUFFIX = "_hv15.safetensors"
TEXT_SUFFIX = "_hv15_te.safetensors"

_LATENTS_NAME = re.compile(
    r"(?P<item>.+?)(?:_(?P<position>\d{5,})-(?P<frames>\d{3,}))?"
    r"_(?P<width>\d{4,})x(?P<height>\d{4,})" + re.escape(LATENTS_SUFFIX),
    re.DOTALL,
)
_LATENTS_KEY = re.compile(r"latents_\d+x\d+x\d+_\w+")
_LATENTS_IMAGE_KEY = re.compile(r"latents_image_\d+x\d+x\d+_\w+")
_SIGLIP_KEY = re.compile(r"siglip_\w+")
_VL_KEY = re.compile(r"varlen_vl_embed_\w+")
_BYT5_KEY = re.compile(r"varlen_byt5_embed_\w+")


@dataclass(frozen=True)
class Latents:
    """The latents of one picture or crop, unscaled (as the VAE returns them)."""

    latents: Tensor  # [32, F, h, w]: latent frames, pixels / 16
    latents_image: Tensor | None  # [33, F, h, w]: first-frame latents, zeros after, mask; i2v only
    siglip: Tensor | None  # [tokens, width] features of the first frame; i2v only
    metadata: dict[str, str]


@dataclass(frozen=True)
class Text:
    """The text embeddings of one caption, without padding."""

    vl_embed: Tensor  # [L, D] from Qwen2.5-VL
    byt5_embed: Tensor  # [L2, D2] of the quoted text; L2 is 0 when the caption quotes none
    caption: str


def image_latents_name(item_key: str, original: Size) -> str:
    """Name the latents file of a picture; ``original`` is its size in pixels before resizing."""
    return f"{item_key}_{_size(original)}{LATENTS_SUFFIX}"


def video_latents_name(item_key: str, crop: Crop, bucket: Size) -> str:
    """Name the latents file of a crop; ``bucket`` is the size in pixels after resizing."""
    return f"{item_key}_{crop.position:05d}-{crop.frames:03d}_{_size(bucket)}{LATENTS_SUFFIX}"


def text_name(item_key: str) -> str:
    """Name the text file of an item; all crops of a clip share it."""
    return f"{item_key}{TEXT_SUFFIX}"


def parse_latents_name(name: str) -> tuple[str, Crop | None, Size]:
    """Parse the name of a latents file.

    A picture whose own name ends like a crop (``x_00000-001.png``) is parsed as a crop; only its
    dataset shows the difference.

    Returns:
        Item key, crop (None for a picture) and size (width, height in pixels).

    Raises:
        UserError: it is not such a name.
    """
    match = _LATENTS_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is not the name of a latent cache (item_0544x0960_hv15...)")
    size = int(match["width"]), int(match["height"])
    if match["position"] is None:
        return match["item"], None, size
    return match["item"], Crop(int(match["position"]), int(match["frames"])), size


def write_latents(
    path: Path | str,
    latents: Tensor,
    *,
    size: Size,
    frame_count: int | None,
    latents_image: Tensor | None = None,
    siglip: Tensor | None = None,
) -> None:
    """Write one latents file; all tensors keep their dtypes.

    Args:
        path: the file.
        latents: [32, F, h, w].
        size: the size in the file's name, in pixels.
        frame_count: the number of frames (not latent frames) of a crop, None for a picture.
        latents_image: [33, F, h, w] for i2v.
        siglip: [tokens, width] for i2v.

    Raises:
        StageError: a value is not a finite number.
    """
    tensors = {f"latents_{_shape(latents)}_{_dtype(latents)}": latents}
    if latents_image is not None:
        tensors[f"latents_image_{_shape(latents_image)}_{_dtype(latents_image)}"] = latents_image
    if siglip is not None:
        tensors[f"siglip_{_dtype(siglip)}"] = siglip
    metadata = {
        "architecture": ARCHITECTURE,
        "width": str(size[0]),
        "height": str(size[1]),
        "format_version": FORMAT_VERSION,
    }
    if frame_count is not None:
        metadata["frame_count"] = str(frame_count)
    _write(Path(path), tensors, metadata)


def write_text(path: Path | str, vl_embed: Tensor, byt5_embed: Tensor, *, caption: str) -> None:
    """Write one text file; the tensors keep their dtypes.

    Args:
        path: the file.
        vl_embed: [L, D].
        byt5_embed: [L2, D2].
        caption: the caption, for the metadata.

    Raises:
        StageError: a value is not a finite number.
    """
    tensors = {
        f"varlen_vl_embed_{_dtype(vl_embed)}": vl_embed,
        f"varlen_byt5_embed_{_dtype(byt5_embed)}": byt5_embed,
    }
    metadata = {
        "architecture": ARCHITECTURE,
        "caption1": caption,
        "format_version": FORMAT_VERSION,
    }
    _write(Path(path), tensors, metadata)


def read_latents(path: Path | str) -> Latents:
    """Read a latents file.

    Raises:
        UserError: it is missing, damaged, or not a latents file.
    """
    tensors, metadata = _read(Path(path))
    latents = _find(Path(path), tensors, _LATENTS_KEY, "latents")
    assert latents is not None
    return Latents(
        latents,
        _find(Path(path), tensors, _LATENTS_IMAGE_KEY),
        _find(Path(path), tensors, _SIGLIP_KEY),
        metadata,
    )


def read_text(path: Path | str) -> Text:
    """Read a text file.

    Raises:
        UserError: it is missing, damaged, or not a text file.
    """
    tensors, metadata = _read(Path(path))
    vl_embed = _find(Path(path), tensors, _VL_KEY, "varlen_vl_embed")
    byt5_embed = _find(Path(path), tensors, _BYT5_KEY, "varlen_byt5_embed")
    assert vl_embed is not None
    assert byt5_embed is not None
    return Text(vl_embed, byt5_embed, metadata.get("caption1", ""))


def _size(size: Size) -> str:
    return f"{size[0]:04d}x{size[1]:04d}"


def _shape(latents: Tensor) -> str:
    return "x".join(str(extent) for extent in latents.shape[1:])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    import torch
    from safetensors.torch import save

    for key, value in tensors.items():
        # A single NaN ruins every training step that uses it, so none is ever stored.
        if not bool(torch.isfinite(value.float()).all()):
            raise StageError(f"{path.name}: {key} has values that are not finite numbers")
    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    content = _in_order(save(ready, metadata=metadata))

    write_bytes(path, content)


def _in_order(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file.

    The library writes metadata in an order that changes from process to process; sorted, equal
    results are equal files. Format: 8 bytes of header length, header JSON padded with spaces
    to a multiple of 8, data (https://github.com/huggingface/safetensors, "Format").
    """
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such cache file; run the caching stages again")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: damaged cache file ({error}); delete it and cache again"
        ) from None


def _find(
    path: Path, tensors: Mapping[str, Tensor], key: re.Pattern[str], required: str = ""
) -> Tensor | None:
    matching = [value for name, value in tensors.items() if key.fullmatch(name)]
    if required and not matching:
        raise UserError(f"{path}: not a cache file of this model, it has no {required}")
    return matching[0] if matching else None
