"""The media and captions that a dataset.toml names, in the order in which they are encoded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.core.errors import UserError
from runner.formats import dataset_toml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner.formats.dataset_toml import DatasetTable


@dataclass(frozen=True)
class MediaToEncode:
    """One picture or clip; ``key``, its name without extension, names its cache files."""

    key: str
    path: Path
    caption: str


def read_dataset(path: Path) -> list[tuple[DatasetTable, list[MediaToEncode]]]:
    """Read the media of each table of a dataset.toml, with paths from the working directory.

    Raises:
        UserError: a file is missing or malformed, or two media have the same key, so that the
            second would overwrite the first one's cache files.
    """
    datasets = [(dataset, _media(dataset)) for dataset in dataset_toml.parse(_text(path))]
    if not any(all_media for _, all_media in datasets):
        raise UserError(f"{path}: there is nothing in its datasets to encode")
    return datasets


def _media(dataset: DatasetTable) -> list[MediaToEncode]:
    all_media = list(_from_directory(dataset) if dataset.jsonl is None else _from_jsonl(dataset))
    seen: dict[str, MediaToEncode] = {}
    for media in all_media:
        if (other := seen.setdefault(media.key, media)) is not media:
            raise UserError(
                f"{other.path} and {media.path} would have the same cache files; rename one"
            )
    return all_media


def _from_jsonl(dataset: DatasetTable) -> Iterator[MediaToEncode]:
    path = Path(dataset.jsonl or "")
    field = f"{dataset.kind}_path"
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not a JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if not all(isinstance(row.get(key), str) for key in (field, "caption")):
            raise UserError(f"{path}, line {number}: {field} and caption must be there as texts")
        media = Path(row[field])
        yield MediaToEncode(media.stem, media, row["caption"])


def _from_directory(dataset: DatasetTable) -> Iterator[MediaToEncode]:
    from runner.formats.media_types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

    folder = Path(dataset.directory or "")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of {dataset.kind}s")
    extensions = IMAGE_EXTENSIONS if dataset.kind == "image" else VIDEO_EXTENSIONS
    for media in sorted(folder.iterdir()):
        if media.suffix.lower() not in extensions or not media.is_file():
            continue
        caption = media.with_suffix(dataset.caption_extension)
        if caption.is_file():
            yield MediaToEncode(media.stem, media, _text(caption).strip())
        else:
            # musubi-tuner silently ignores such pictures and crashes on such clips.
            print(f"{media.name}: no caption file {caption.name}, left out")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
