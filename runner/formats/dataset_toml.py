"""musubi-tuner's dataset.toml: `[general]` defaults and one `[[datasets]]` table per set.

Keys, types and defaults are those of musubi-tuner v0.3.4, as far as HunyuanVideo 1.5 uses them.
Paths are kept as written; musubi-tuner takes them relative to the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runner.config.dataset_schema import FRAME_EXTRACTIONS
from runner.core.errors import UserError
from runner.formats.bucket import Size
from runner.formats.frames import FrameExtraction


@dataclass(frozen=True)
class DatasetTable:
    """One ``[[datasets]]`` table.

    Attributes:
        kind: image or video.
        cache_directory: the folder of its latent and text files.
        resolution: width and height in pixels.
        jsonl, directory: the source of media and captions; exactly one of them is set.
        extraction: how crops are cut from clips; required for video, None for image.
    """

    kind: Literal["image", "video"]
    cache_directory: str
    resolution: Size
    jsonl: str | None = None
    directory: str | None = None
    caption_extension: str = ".txt"
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = True
    bucket_no_upscale: bool = False
    extraction: FrameExtraction | None = None


def render(datasets: Sequence[DatasetTable]) -> str:
    """Render a dataset.toml; equal datasets give equal text, and every key is written.

    Raises:
        UserError: musubi-tuner would refuse or misread a dataset.
    """
    import tomli_w

    _check(datasets)
    return tomli_w.dumps({"datasets": [_table(dataset) for dataset in datasets]})


def _table(dataset: DatasetTable) -> dict[str, Any]:
    table: dict[str, Any] = {}
    if dataset.jsonl is not None:
        table[f"{dataset.kind}_jsonl_file"] = dataset.jsonl
    else:
        table[f"{dataset.kind}_directory"] = dataset.directory
    table |= {
        "cache_directory": dataset.cache_directory,
        "resolution": list(dataset.resolution),
        "caption_extension": dataset.caption_extension,
        "batch_size": dataset.batch_size,
        "num_repeats": dataset.num_repeats,
        "enable_bucket": dataset.enable_bucket,
        "bucket_no_upscale": dataset.bucket_no_upscale,
    }
    if dataset.extraction is not None:
        extraction = dataset.extraction
        values = {key: getattr(extraction, name) for key, (name, _) in _EXTRACTION.items()}
        # musubi-tuner accepts a list, not a tuple, and for the rate only a float; to keep every
        # frame the key must be missing.
        values["target_frames"] = list(extraction.target_frames)
        if extraction.source_fps is None:
            del values["source_fps"]
        else:
            values["source_fps"] = float(extraction.source_fps)
        table |= values
    return table


def _check(datasets: Sequence[DatasetTable]) -> None:
    cache_directories: set[str] = set()
    for number, dataset in enumerate(datasets, 1):
        where = f"dataset {number}"
        if (dataset.jsonl is None) == (dataset.directory is None):
            raise UserError(f"{where}: exactly one of a jsonl file and a directory is needed")
        if (dataset.kind == "video") != (dataset.extraction is not None):
            raise UserError(f"{where}: frame extraction belongs to video, and to video only")
        if dataset.cache_directory in cache_directories:
            raise UserError(
                f"{where}: cache_directory {dataset.cache_directory!r} is another dataset's: "
                "each needs its own"
            )
        cache_directories.add(dataset.cache_directory)


# Each reader checks and returns one value, or raises ValueError with what it must be.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _positive_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number of at least 1")
    return value


def _resolution(value: Any) -> Size:
    try:
        width, height = value if isinstance(value, list) else (value, value)
        return _positive_int(width), _positive_int(height)
    except ValueError:
        raise ValueError("[width, height] in pixels, or one number for both") from None


def _lengths(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of numbers of frames")
    return tuple(_positive_int(number) for number in value)


def _mode(value: Any) -> str:
    if value not in FRAME_EXTRACTIONS:
        raise ValueError(f"one of {', '.join(FRAME_EXTRACTIONS)}")
    return _text(value)


def _rate(value: Any) -> float:
    # musubi-tuner refuses 30 and accepts 30.0.
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ValueError("frames per second with a decimal point, such as 30.0")
    return value


_Reader = Callable[[Any], Any]
_SHARED: dict[str, _Reader] = {
    "resolution": _resolution,
    "caption_extension": _text,
    "batch_size": _positive_int,
    "num_repeats": _positive_int,
    "enable_bucket": _flag,
    "bucket_no_upscale": _flag,
}
# Keys about the frames of clips, with their names in FrameExtraction.
_EXTRACTION: dict[str, tuple[str, _Reader]] = {
    "target_frames": ("target_frames", _lengths),
    "frame_extraction": ("mode", _mode),
    "frame_stride": ("stride", _positive_int),
    "frame_sample": ("sample", _positive_int),
    "max_frames": ("max_frames", _positive_int),
    "source_fps": ("source_fps", _rate),
}
_IMAGE: dict[str, _Reader] = {
    "image_directory": _text,
    "image_jsonl_file": _text,
    "cache_directory": _text,
}
_VIDEO: dict[str, _Reader] = {
    "video_directory": _text,
    "video_jsonl_file": _text,
    "cache_directory": _text,
    **{key: reader for key, (_, reader) in _EXTRACTION.items()},
}
# musubi-tuner's own defaults, which apply to a file that omits these keys; DatasetTable's differ.
_MUSUBI_DEFAULTS: dict[str, Any] = {"resolution": (960, 544), "enable_bucket": False}


def parse(text: str) -> list[DatasetTable]:
    """Parse a dataset.toml; the inverse of :func:`render`, with support for ``[general]``.

    Raises:
        UserError: the text is not TOML, a key is unknown, a value has a wrong type, or a table has
            no source or no cache directory.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"dataset.toml is not valid TOML: {error}") from None
    if unknown := set(document) - {"general", "datasets"}:
        raise UserError(
            f"dataset.toml: unknown key {min(unknown)!r} (it has [general] and [[datasets]])"
        )
    general, tables = document.get("general", {}), document.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(tables, list):
        raise UserError("dataset.toml: general must be a [general] table, datasets [[datasets]]")
    shared = _MUSUBI_DEFAULTS | _read(general, _SHARED, "[general]")
    datasets = [_parse_table(table, shared, number) for number, table in enumerate(tables, 1)]
    _check(datasets)
    return datasets


def _read(table: Mapping[str, Any], readers: Mapping[str, _Reader], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in readers:
            raise UserError(f"dataset.toml, {where}: unknown key {key!r}")
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            raise UserError(
                f"dataset.toml, {where}: {key} = {value!r} is wrong, it must be {error}"
            ) from None
    return values


def _parse_table(table: Any, shared: Mapping[str, Any], number: int) -> DatasetTable:
    where = f"dataset {number}"
    if not isinstance(table, dict):
        raise UserError(f"dataset.toml, {where}: must be a [[datasets]] table")
    kinds = {key.split("_")[0] for key in table if key in {**_IMAGE, **_VIDEO}} & {"image", "video"}
    if len(kinds) != 1:
        raise UserError(
            f"dataset.toml, {where}: exactly one of image_jsonl_file, image_directory, "
            "video_jsonl_file and video_directory is needed"
        )
    kind: Literal["image", "video"] = "video" if "video" in kinds else "image"
    values = {**shared, **_read(table, _SHARED | (_VIDEO if kind == "video" else _IMAGE), where)}
    jsonl = values.pop(f"{kind}_jsonl_file", None)
    directory = values.pop(f"{kind}_directory", None)
    if "cache_directory" not in values:
        if directory is None:
            raise UserError(f"dataset.toml, {where}: cache_directory is missing")
        values["cache_directory"] = directory
    extraction = None
    if kind == "video":
        frames = {name: values.pop(key) for key, (name, _) in _EXTRACTION.items() if key in values}
        extraction = FrameExtraction(**frames)
    return DatasetTable(
        kind=kind, jsonl=jsonl, directory=directory, extraction=extraction, **values
    )
