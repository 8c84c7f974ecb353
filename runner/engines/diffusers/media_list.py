"""The media and captions that a dataset.toml names, in the order they are encoded."""

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
    """One picture or clip. `key` is its file name without extension, which names its caches."""

    key: str
    media: Path
    caption: str


def read_dataset(path: Path) -> list[tuple[DatasetTable, list[MediaToEncode]]]:
    """Each dataset with its items. Paths count from the working directory.

    Raises UserError for files that are missing or malformed, and for two media of one key, since
    the second would overwrite the first one's caches.
    """
    entries = dataset_toml.parse(_text(path))
    found = [(entry, _items(entry)) for entry in entries]
    if not any(items for _, items in found):
        raise UserError(f"{path}: there is nothing in its datasets to encode")
    return found


def _items(entry: DatasetTable) -> list[MediaToEncode]:
    items = list(_from_directory(entry) if entry.jsonl is None else _from_jsonl(entry))
    seen: dict[str, MediaToEncode] = {}
    for item in items:
        if (other := seen.setdefault(item.key, item)) is not item:
            raise UserError(
                f"{other.media} and {item.media} have one name, and caches go by it; rename one"
            )
    return items


def _from_jsonl(entry: DatasetTable) -> Iterator[MediaToEncode]:
    path = Path(entry.jsonl or "")
    field = f"{entry.kind}_path"
    for number, line in enumerate(_text(path).splitlines(), start=1):
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


def _from_directory(entry: DatasetTable) -> Iterator[MediaToEncode]:
    from runner.formats.media_types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

    folder = Path(entry.directory or "")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of {entry.kind}s")
    extensions = IMAGE_EXTENSIONS if entry.kind == "image" else VIDEO_EXTENSIONS
    for media in sorted(folder.iterdir()):
        if media.suffix.lower() not in extensions or not media.is_file():
            continue
        caption = media.with_suffix(entry.caption_extension)
        if caption.is_file():
            yield MediaToEncode(media.stem, media, _text(caption).strip())
        else:
            # musubi-tuner drops such pictures in silence and crashes on such clips.
            print(f"{media.name}: no caption file {caption.name}, left out")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
