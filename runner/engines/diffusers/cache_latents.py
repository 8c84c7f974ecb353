"""Encode pictures and clips with the VAE (for i2v also SigLIP) into musubi-tuner's cache files.

python -m runner.engines.diffusers.cache_latents --dataset_config dataset.toml --vae VAE
    [--vae_sample_size 128] [--i2v --image_encoder SIGLIP]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runner.core.errors import UserError
from runner.data.decode import load_clip, load_image, resize_to_bucket
from runner.engines.diffusers import cli
from runner.engines.diffusers.media_list import MediaToEncode, read_dataset
from runner.engines.diffusers.models import load_image_encoder, load_vae
from runner.formats import cache_files
from runner.formats.bucket import bucket_size
from runner.formats.frames import crops

if TYPE_CHECKING:
    import numpy as np

    from runner.formats.dataset_toml import DatasetTable

_TILE_STEP = 64  # a quarter of a tile is blended, and must be whole latents of 16 pixels


@torch.no_grad()
def encode_frames(vae: Any, frames: np.ndarray) -> torch.Tensor:
    """Encode frames [F, H, W, 3] uint8 with the VAE.

    Returns:
        Latents [32, (F-1)/4+1, H/16, W/16] in the VAE's dtype: the mode of its distribution, not
        scaled, because training multiplies by the scaling factor.
    """
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).contiguous()
    pixels = pixels.to(vae.device, vae.dtype) / 127.5 - 1.0
    latents: torch.Tensor = vae.encode(pixels).latent_dist.mode()[0]
    return latents


def first_frame_condition(vae: Any, frames: np.ndarray, latents: torch.Tensor) -> torch.Tensor:
    """Make the condition of i2v from a clip's frames and latents.

    Returns:
        [33, F, h, w] float32: the latents of the first frame, encoded alone, then zeros. The last
        channel is a mask, 1 on the first latent frame.
    """
    channels, *extents = latents.shape
    condition = torch.zeros(channels + 1, *extents, device=latents.device)
    condition[:-1, :1] = encode_frames(vae, frames[:1]).float()
    condition[-1, 0] = 1.0
    return condition


@torch.no_grad()
def image_features(processor: Any, image_encoder: Any, frame: np.ndarray) -> torch.Tensor:
    """Return SigLIP's last hidden state [tokens, width] float16 of a frame [H, W, 3] uint8."""
    pixels = processor.preprocess(images=frame, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(image_encoder.device, image_encoder.dtype)
    features: torch.Tensor = image_encoder(pixel_values=pixels).last_hidden_state[0]
    return features.to(torch.float16)


def cache_image(vae: Any, dataset: DatasetTable, media: MediaToEncode) -> None:
    """Encode one picture in its bucket and write its cache file.

    Raises:
        UserError: the picture is too small.
    """
    image = load_image(media.path)
    original = (image.shape[1], image.shape[0])
    bucket = bucket_size(
        original,
        dataset.resolution,
        enable_bucket=dataset.enable_bucket,
        bucket_no_upscale=dataset.bucket_no_upscale,
    )
    if min(bucket) < 16:
        raise UserError(f"{media.path}: {original[0]}x{original[1]} is too small to encode")
    latents = encode_frames(vae, resize_to_bucket(image, bucket)[None].copy())
    name = cache_files.image_latents_name(media.key, original)
    cache_files.write_latents(
        Path(dataset.cache_directory) / name, latents, size=original, frame_count=None
    )


def cache_clip(
    vae: Any, dataset: DatasetTable, media: MediaToEncode, siglip: tuple[Any, Any] | None
) -> None:
    """Encode each crop of one clip and write the cache files.

    A clip shorter than every target length gives no file, and a line on standard output says so.

    Args:
        vae: the VAE.
        dataset: the table that the clip belongs to.
        media: the clip.
        siglip: SigLIP's processor and model, only for i2v.

    Raises:
        UserError: the clip's frames are too small.
    """
    assert dataset.extraction is not None
    frames = load_clip(media.path, dataset.extraction, dataset.resolution)
    bucket = (frames.shape[2], frames.shape[1])
    if min(bucket) < 16:
        raise UserError(f"{media.path}: {bucket[0]}x{bucket[1]} is too small to encode")
    chosen = crops(len(frames), dataset.extraction)
    if not chosen:
        targets = ", ".join(str(frames) for frames in dataset.extraction.target_frames)
        print(f"{media.path.name}: {len(frames)} frames are fewer than every target ({targets})")
    for crop in chosen:
        pixels = frames[crop.position : crop.position + crop.frames]
        latents = encode_frames(vae, pixels)
        name = cache_files.video_latents_name(media.key, crop, bucket)
        cache_files.write_latents(
            Path(dataset.cache_directory) / name,
            latents,
            size=bucket,
            frame_count=crop.frames,
            latents_image=first_frame_condition(vae, pixels, latents) if siglip else None,
            siglip=image_features(*siglip, pixels[0]) if siglip else None,
        )


def main(arguments: list[str]) -> None:
    """Encode all media of a dataset.toml.

    Raises:
        UserError: arguments, dataset or weights cannot be used.
    """
    options = _options(arguments)
    datasets = read_dataset(options.dataset_config)
    _check(datasets, options)

    vae = load_vae(options.vae, device=options.device)
    if tile := options.vae_sample_size:
        ratio = vae.spatial_compression_ratio
        vae.enable_tiling(tile, tile, tile // ratio, tile // ratio)
    siglip = None
    if options.i2v:
        siglip = load_image_encoder(options.image_encoder, device=options.device)

    total = sum(len(all_media) for _, all_media in datasets)
    done = 0
    for dataset, all_media in datasets:
        for media in all_media:
            if dataset.kind == "image":
                cache_image(vae, dataset, media)
            else:
                cache_clip(vae, dataset, media, siglip)
            done += 1
            print(f"{done}/{total} {media.path.name}")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cache_latents", description=__doc__)
    parser.add_argument("--dataset_config", type=Path, required=True, help="dataset.toml")
    parser.add_argument("--vae", type=Path, required=True, help="the VAE: file or folder")
    parser.add_argument(
        "--vae_sample_size", type=int, default=128, help="side of a tile in pixels; 0: no tiling"
    )
    parser.add_argument(
        "--i2v", action="store_true", help="also encode the first frames, for image-to-video"
    )
    parser.add_argument("--image_encoder", type=Path, help="SigLIP, for --i2v")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def _check(
    datasets: list[tuple[DatasetTable, list[MediaToEncode]]], options: argparse.Namespace
) -> None:  # fmt: skip
    """Check arguments and media before the first network is loaded."""
    tile = options.vae_sample_size
    if tile < 0 or tile % _TILE_STEP:
        raise UserError(f"--vae_sample_size {tile}: must be 0 or a multiple of {_TILE_STEP} pixels")
    if options.i2v and options.image_encoder is None:
        raise UserError("--i2v needs --image_encoder, the weights of SigLIP")
    for dataset, all_media in datasets:
        if options.i2v and dataset.kind == "image":
            where = dataset.jsonl or dataset.directory
            raise UserError(
                f"{where}: image-to-video learns motion, and a dataset of pictures has none; "
                "use clips, or task=t2v"
            )
        for media in all_media:
            if not media.path.is_file():
                raise UserError(f"{media.path}: no such file, though the dataset names it")


if __name__ == "__main__":
    cli.run(main)
