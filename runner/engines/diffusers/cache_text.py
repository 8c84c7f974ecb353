"""Encode captions with Qwen2.5-VL and ByT5 into musubi-tuner's cache files.

python -m runner.engines.diffusers.cache_text --dataset_config dataset.toml
    --text_encoder QWEN --byt5 BYT5 [--batch_size 4] [--memory_limit_gb 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from runner.core.errors import UserError
from runner.engines.diffusers import cli
from runner.engines.diffusers.media_list import read_dataset
from runner.engines.diffusers.models import load_byt5
from runner.engines.diffusers.placement import load_text_encoder
from runner.engines.diffusers.text_encoding import encode_captions, encode_glyphs
from runner.formats import cache_files
from runner.formats.captions import MAX_TOKENS


def main(arguments: list[str]) -> None:
    """Encode all captions of a dataset.toml.

    Raises:
        UserError: arguments, dataset or weights cannot be used.
    """
    options = _options(arguments)
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size}: must be 1 or more")
    datasets = read_dataset(options.dataset_config)

    items = max((options.batch_size or dataset.batch_size for dataset, _ in datasets), default=1)
    tokenizer, text_encoder = load_text_encoder(
        options.text_encoder,
        options.device,
        tokens=items * MAX_TOKENS,
        limit_gb=options.memory_limit_gb,
    )
    byt5_tokenizer, byt5 = load_byt5(options.byt5, device=options.device)

    total = sum(len(all_media) for _, all_media in datasets)
    done = 0
    for dataset, all_media in datasets:
        size = options.batch_size or dataset.batch_size
        for start in range(0, len(all_media), size):
            batch = all_media[start : start + size]
            captions = [media.caption for media in batch]
            embeds = encode_captions(tokenizer, text_encoder, captions)
            for media, vl_embed in zip(batch, embeds, strict=True):
                cache_files.write_text(
                    Path(dataset.cache_directory) / cache_files.text_name(media.key),
                    vl_embed,
                    encode_glyphs(byt5_tokenizer, byt5, media.caption),
                    caption=media.caption,
                )
                done += 1
                print(f"{done}/{total} {media.path.name}")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cache_text", description=__doc__)
    parser.add_argument("--dataset_config", type=Path, required=True, help="dataset.toml")
    parser.add_argument(
        "--text_encoder", type=Path, required=True, help="Qwen2.5-VL: file or folder"
    )
    parser.add_argument("--byt5", type=Path, required=True, help="ByT5: file or folder")
    parser.add_argument(
        "--batch_size", type=int, help="captions per batch; default: the dataset's batch_size"
    )
    cli.add_memory_limit(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
