"""musubi-tuner's dataset.toml: `[general]` defaults and one `[[datasets]]` table for each set.

Keys, types and defaults are those of musubi-tuner v0.3.4, as far as HunyuanVideo 1.5 uses them.
Paths are kept as written; musubi takes them relative to the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runner.config.schema import FRAME_EXTRACTIONS
from runner.core.errors import UserError
from runner.formats.bucket import Size
from runner.formats.frames import FrameExtraction


@dataclass(frozen=True)
class DatasetTable:
    """One `[[datasets]]` table. Exactly one of `jsonl` and `directory` is given.

    `resolution` is width and height in pixels; `extraction` belongs to video and is then needed.
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


def render(entries: Sequence[DatasetTable]) -> str:
    """The file's text: equal entries give equal text, and every table is complete.

    Raises UserError for entries that musubi would refuse or misread.
    """
    import tomli_w

    _check(entries)
    return tomli_w.dumps({"datasets": [_table(entry) for entry in entries]})


def _table(entry: DatasetTable) -> dict[str, Any]:
    table: dict[str, Any] = {}
    if entry.jsonl is not None:
        table[f"{entry.kind}_jsonl_file"] = entry.jsonl
    else:
        table[f"{entry.kind}_directory"] = entry.directory
    table |= {
        "cache_directory": entry.cache_directory,
        "resolution": list(entry.resolution),
        "caption_extension": entry.caption_extension,
        "batch_size": entry.batch_size,
        "num_repeats": entry.num_repeats,
        "enable_bucket": entry.enable_bucket,
        "bucket_no_upscale": entry.bucket_no_upscale,
    }
    if entry.extraction is not None:
        extraction = entry.extraction
        values = {key: getattr(extraction, name) for key, (name, _) in _EXTRACTION.items()}
        # musubi takes a list, not a tuple; of rates a float only, and an absent key for "keep
        # every frame".
        values["target_frames"] = list(extraction.target_frames)
        if extraction.source_fps is None:
            del values["source_fps"]
        else:
            values["source_fps"] = float(extraction.source_fps)
        table |= values
    return table


def _check(entries: Sequence[DatasetTable]) -> None:
    caches: set[str] = set()
    for number, entry in enumerate(entries, 1):
        where = f"dataset {number}"
        if (entry.jsonl is None) == (entry.directory is None):
            raise UserError(f"{where}: exactly one of a jsonl file and a directory is needed")
        if (entry.kind == "video") != (entry.extraction is not None):
            raise UserError(f"{where}: frame extraction belongs to video, and to video only")
        if entry.cache_directory in caches:
            raise UserError(
                f"{where}: cache_directory {entry.cache_directory!r} is another dataset's: "
                "each needs its own"
            )
        caches.add(entry.cache_directory)


# Each reader checks one value and gives it back, or raises ValueError saying what is wanted.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number of at least 1")
    return value


def _resolution(value: Any) -> Size:
    try:
        width, height = value if isinstance(value, list) else (value, value)
        return _whole(width), _whole(height)
    except ValueError:
        raise ValueError("[width, height] in pixels, or one number for both") from None


def _lengths(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of numbers of frames")
    return tuple(_whole(item) for item in value)


def _mode(value: Any) -> str:
    if value not in FRAME_EXTRACTIONS:
        raise ValueError(f"one of {', '.join(FRAME_EXTRACTIONS)}")
    return _text(value)


def _rate(value: Any) -> float:
    # musubi refuses 30 and takes 30.0.
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ValueError("frames a second with a decimal point, such as 30.0")
    return value


_Reader = Callable[[Any], Any]
_SHARED: dict[str, _Reader] = {
    "resolution": _resolution,
    "caption_extension": _text,
    "batch_size": _whole,
    "num_repeats": _whole,
    "enable_bucket": _flag,
    "bucket_no_upscale": _flag,
}
# Keys of a clip's frames, with the names that FrameExtraction has for them.
_EXTRACTION: dict[str, tuple[str, _Reader]] = {
    "target_frames": ("target_frames", _lengths),
    "frame_extraction": ("mode", _mode),
    "frame_stride": ("stride", _whole),
    "frame_sample": ("sample", _whole),
    "max_frames": ("max_frames", _whole),
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
# DatasetEntry's default for buckets is the runner's; a file that leaves the key out means off.
_MUSUBI_DEFAULTS: dict[str, Any] = {"resolution": (960, 544), "enable_bucket": False}


def parse(text: str) -> list[DatasetTable]:
    """Entries of a dataset.toml; the inverse of `render`, and `[general]` counts too.

    Raises UserError for text that is not TOML, unknown keys, wrong types, and tables that lack a
    source or a cache directory.
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
    entries = [_parse_table(table, shared, number) for number, table in enumerate(tables, 1)]
    _check(entries)
    return entries


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
        given = {name: values.pop(key) for key, (name, _) in _EXTRACTION.items() if key in values}
        extraction = FrameExtraction(**given)
    return DatasetTable(
        kind=kind, jsonl=jsonl, directory=directory, extraction=extraction, **values
    )
