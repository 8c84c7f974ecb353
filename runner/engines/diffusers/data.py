"""Training batches from the caches that dataset.toml names.

A dataset is every latent cache in its folder. Items of one latent shape share batches; the order is
drawn anew each epoch from the seed alone, never from the file system's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.core.errors import UserError
from runner.engines.diffusers.flow import Batch, TrainingExample, collate
from runner.formats import cache_files, dataset_toml

if TYPE_CHECKING:
    from runner.formats.dataset_toml import DatasetTable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExampleFiles:
    """One latent cache and its caption's; `shape` is [32, F, h, w]."""

    latents: Path
    text: Path
    shape: Shape


@dataclass(frozen=True)
class Dataset:
    """The items of one `[[datasets]]` table, sorted by file name."""

    items: tuple[ExampleFiles, ...]
    batch_size: int
    num_repeats: int


def scan(dataset_config: Path | str, task: str) -> list[Dataset]:
    """Find the caches of every dataset, reading their headers alone.

    Args:
        dataset_config: a dataset.toml; its paths are relative to the working directory.
        task: `t2v` or `i2v`; caches made for the other are refused, because the network would
            silently be conditioned on the first frame, or not be.

    Raises:
        UserError: no caches, an item without its caption's cache, a cache of the other task, a
            file that is no cache of this model.
    """
    try:
        text = Path(dataset_config).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{dataset_config}: cannot be read ({error.strerror})") from None
    datasets = [_dataset(entry, task) for entry in dataset_toml.parse(text)]
    if not any(dataset.items for dataset in datasets):
        raise UserError(f"{dataset_config}: its cache folders hold no latents; cache them first")
    return datasets


def _dataset(entry: DatasetTable, task: str) -> Dataset:
    folder = Path(entry.cache_directory)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such cache folder; run the latents stage first")
    items = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if not path.name.endswith(cache_files.LATENTS_SUFFIX):
            continue
        name, crop, _size = cache_files.parse_latents_name(path.name)
        if entry.kind == "image" and crop is not None:
            # A picture may be called like a crop.
            name = f"{name}_{crop.position:05d}-{crop.frames:03d}"
        text = folder / cache_files.text_name(name)
        if not text.exists():
            raise UserError(
                f"{folder}: {name!r} has latents but no caption cache ({text.name}); "
                "run the text stage again"
            )
        items.append(ExampleFiles(path, text, _shape(path, task)))
    return Dataset(tuple(items), entry.batch_size, entry.num_repeats)


def _shape(path: Path, task: str) -> Shape:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            plain = [n for n in names if n.startswith("latents_") and "_image_" not in n]
            if len(plain) != 1:
                raise UserError(f"{path}: not a latent cache of this model")
            shape = tuple(file.get_slice(plain[0]).get_shape())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged cache file ({error}); delete it, cache again") from None
    image = any(name.startswith("latents_image_") for name in names)
    siglip = any(name.startswith("siglip_") for name in names)
    if task == "t2v" and (image or siglip):
        raise UserError(f"{path}: made for i2v, and this is a t2v run; cache again for t2v")
    if task == "i2v" and not (image and siglip):
        raise UserError(
            f"{path}: has no first-frame condition, and this is an i2v run; cache again for i2v"
        )
    return shape


def load(item: ExampleFiles) -> TrainingExample:
    """Read one item's tensors. Raises UserError for a missing or damaged file."""
    latents = cache_files.read_latents(item.latents)
    text = cache_files.read_text(item.text)
    return TrainingExample(
        latents=latents.latents,
        text=text.vl_embed,
        byt5=text.byt5_embed,
        condition=latents.latents_image,
        vision=latents.siglip,
    )


def epoch_batches(
    datasets: Sequence[Dataset], *, seed: int, epoch: int
) -> list[tuple[ExampleFiles, ...]]:
    """One epoch's batches in training order; the same arguments give the same batches.

    Each item comes `num_repeats` times. A batch holds items of one dataset and one latent shape,
    and the last one of a shape may be smaller.
    """
    shuffle = random.Random(f"{seed}/shuffle/{epoch}")
    batches: list[tuple[ExampleFiles, ...]] = []
    for dataset in datasets:
        buckets: dict[Shape, list[ExampleFiles]] = {}
        for item in dataset.items:
            buckets.setdefault(item.shape, []).extend([item] * dataset.num_repeats)
        for _shape, items in sorted(buckets.items()):
            shuffle.shuffle(items)
            size = dataset.batch_size
            batches += [tuple(items[at : at + size]) for at in range(0, len(items), size)]
    shuffle.shuffle(batches)
    return batches


def load_batches(batches: Sequence[Sequence[ExampleFiles]]) -> Iterator[Batch]:
    """The batches in order, each read from disk while the one before is in use."""

    def read(items: Sequence[ExampleFiles]) -> Batch:
        return collate([load(item) for item in items])

    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = None
        for items in batches:
            ready, coming = coming, pool.submit(read, items)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
