"""Training batches from the cache files that dataset.toml names.

A dataset consists of all latent cache files in its folder. Examples of the same latent shape share
batches. The order of each epoch depends only on the seed, never on the file system.
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
    """The latent and text cache files of an example; ``shape`` is [32, F, h, w]."""

    latents: Path
    text: Path
    shape: Shape


@dataclass(frozen=True)
class Dataset:
    """The examples of one ``[[datasets]]`` table, sorted by file name."""

    examples: tuple[ExampleFiles, ...]
    batch_size: int
    num_repeats: int


def scan(dataset_config: Path | str, task: str) -> list[Dataset]:
    """Find the cache files of every dataset, reading only their headers.

    Args:
        dataset_config: a dataset.toml; its paths are relative to the working directory.
        task: ``t2v`` or ``i2v``; files made for the other are rejected, because the network would
            silently be conditioned on the first frame, or not.

    Raises:
        UserError: no caches, an item without its caption's cache, a cache of the other task, a
            file that is no cache of this model.
    """
    try:
        text = Path(dataset_config).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{dataset_config}: cannot be read ({error.strerror})") from None
    datasets = [_dataset(table, task) for table in dataset_toml.parse(text)]
    if not any(dataset.examples for dataset in datasets):
        raise UserError(f"{dataset_config}: its cache folders hold no latents; cache them first")
    return datasets


def _dataset(table: DatasetTable, task: str) -> Dataset:
    folder = Path(table.cache_directory)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such cache folder; run the latents stage first")
    examples = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if not path.name.endswith(cache_files.LATENTS_SUFFIX):
            continue
        name, crop, _size = cache_files.parse_latents_name(path.name)
        if table.kind == "image" and crop is not None:
            # The name of a picture may look like that of a crop.
            name = f"{name}_{crop.position:05d}-{crop.frames:03d}"
        text = folder / cache_files.text_name(name)
        if not text.exists():
            raise UserError(
                f"{folder}: {name!r} has latents but no caption cache ({text.name}); "
                "run the text stage again"
            )
        examples.append(ExampleFiles(path, text, _shape(path, task)))
    return Dataset(tuple(examples), table.batch_size, table.num_repeats)


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


def load(files: ExampleFiles) -> TrainingExample:
    """Read the tensors of one example.

    Raises:
        UserError: a file is missing or damaged.
    """
    latents = cache_files.read_latents(files.latents)
    text = cache_files.read_text(files.text)
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
    """Make the batches of one epoch; the same arguments give the same batches.

    Each example is repeated ``num_repeats`` times. A batch holds examples of one dataset and one
    latent shape; the last one of a shape may be smaller.

    Returns:
        The batches in training order.
    """
    shuffle = random.Random(f"{seed}/shuffle/{epoch}")
    batches: list[tuple[ExampleFiles, ...]] = []
    for dataset in datasets:
        buckets: dict[Shape, list[ExampleFiles]] = {}
        for files in dataset.examples:
            buckets.setdefault(files.shape, []).extend([files] * dataset.num_repeats)
        for _shape, examples in sorted(buckets.items()):
            shuffle.shuffle(examples)
            size = dataset.batch_size
            batches += [tuple(examples[at : at + size]) for at in range(0, len(examples), size)]
    shuffle.shuffle(batches)
    return batches


def load_batches(batches: Sequence[Sequence[ExampleFiles]]) -> Iterator[Batch]:
    """Yield the batches in order, reading each from disk while the one before is in use."""

    def read(examples: Sequence[ExampleFiles]) -> Batch:
        return collate([load(files) for files in examples])

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = None
        for examples in batches:
            ready, following = following, pool.submit(read, examples)
            if ready is not None:
                yield ready.result()
        if following is not None:
            yield following.result()
