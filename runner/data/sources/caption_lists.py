"""Files that list media and their captions, as other tools write them.

- ``metadata.jsonl`` and ``metadata.csv`` of the Hugging Face loaders: ``file_name``, and ``text``
  or ``caption`` (docs of ``datasets``, ImageFolder and VideoFolder)
- ``captions.json`` of diffusion-pipe: an object of names and lists of captions
- ``prompts.txt`` beside ``videos.txt`` of finetrainers: a line for each medium
- metadata of kohya's sd-scripts: an object of names and ``{"caption": ..., "tags": ...}``
- JSONL of musubi-tuner: ``image_path`` or ``video_path``, and ``caption``
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.core.errors import UserError
from runner.core.text import printable, readable
from runner.data.sources.texts import MAX_CAPTION, clean

# Their rows must name media that are there; other lists may be of something else.
STRICT = ("metadata.jsonl", "metadata.csv")
PROMPT_NAMES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
MEDIA_NAMES = ("videos.txt", "video.txt", "images.txt", "image.txt")

_MEDIA_KEYS = (
    "file_name", "image_path", "video_path", "media_path", "file_path", "path",
    "image_file", "video_file", "image", "video", "filename",
)  # fmt: skip
_CAPTION_KEYS = ("text", "caption", "captions", "prompt")


class NoList(ValueError):
    """The text lists no media; it may be something else."""


@dataclass(frozen=True)
class Row:
    """A medium as a list names it, its captions, and the place in the list for messages."""

    place: str
    media: str
    captions: tuple[str, ...]


def pairs_of_lists(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the list of captions and the list of media of each folder that has both."""
    present = set(names)
    for folder in sorted({posixpath.dirname(name) for name in names}):
        prompts = (posixpath.join(folder, name) for name in PROMPT_NAMES)
        media = (posixpath.join(folder, name) for name in MEDIA_NAMES)
        found = next((p for p in prompts if p in present), None)
        listed = next((p for p in media if p in present), None)
        if found is not None and listed is not None:
            yield found, listed


def parse_list(name: str, text: str, where: str) -> list[Row]:
    """Read a list of captions in any of its formats.

    Args:
        name: the file's name, which says JSON, JSON Lines or CSV.
        text: its text.
        where: what messages call it.

    Raises:
        NoList: it lists no media.
        UserError: it is malformed.
    """
    lowered = name.lower()
    if lowered.endswith(".csv"):
        return _of_csv(text, where)
    if lowered.endswith(".jsonl"):
        return [
            _row(place, record, "file_name" if posixpath.basename(name) in STRICT else None)
            for place, record in json_lines(text, where, "file_name")
        ]
    document = load_json(text, where)
    if isinstance(document, list):
        if not all(isinstance(one, dict) for one in document) or not document:
            raise NoList
        return [_row(f"{where} entry {n}", one, None) for n, one in enumerate(document, 1)]
    if not isinstance(document, dict):
        raise NoList
    return list(_of_object(document, where))


def parse_pair(prompts: str, media: str, where: str) -> list[Row]:
    """Read a list of captions and a list of media, line by line.

    Raises:
        UserError: they have different numbers of lines.
    """
    captions, listed = (text.rstrip().split("\n") for text in (prompts, media))
    if len(captions) != len(listed):
        raise UserError(
            f"{where}: has {len(captions)} captions for {len(listed)} media: make it one line each"
        )
    rows = zip(captions, listed, strict=True)
    return [
        Row(f"{where} line {n}", file.strip(), captions_in(caption, f"{where} line {n}"))
        for n, (caption, file) in enumerate(rows, 1)
        if file.strip()
    ]


def json_lines(text: str, where: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line of JSON Lines.

    Raises:
        UserError: a line is malformed.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{where} line {number}"
        record = load_json(line, place)
        if not isinstance(record, dict):
            raise UserError(f'{place}: must be an object such as {{"{key}": ...}}')
        yield place, record


def load_json(text: str, where: str) -> Any:
    """Parse JSON of whatever origin.

    Raises:
        UserError: it is malformed, or can't be taken.
    """
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: has half of a character (\\ud800 to \\udfff): write both halves"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: it is nested too deep") from None
    except ValueError:
        # Python limits the digits of a whole number.
        raise UserError(f"{where}: not valid JSON: it has a number of too many digits") from None
    return document


def _row(place: str, record: Mapping[str, Any], key: str | None) -> Row:
    keys = (key,) if key is not None else _MEDIA_KEYS
    media = next((record[one] for one in keys if one in record), None)
    if not isinstance(media, str):
        if key is None:
            raise NoList
        raise UserError(f"{place}: needs a {key}, a string")
    caption = next((record[one] for one in _CAPTION_KEYS if record.get(one) is not None), None)
    return Row(place, media, captions_in(caption, place))


def _of_object(document: Mapping[str, Any], where: str) -> Iterator[Row]:
    for media, value in document.items():
        place = f"{where} at {printable(media[:100])}"
        if isinstance(value, dict):
            # In kohya's metadata tags follow the caption.
            both = [value.get("caption"), value.get("tags")]
            value = ", ".join(one for one in both if isinstance(one, str) and one.strip())
            if not value:
                continue
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise NoList
        yield Row(place, media, captions_in(value, place))


def _of_csv(text: str, where: str) -> list[Row]:
    head = text.split("\n", 1)[0]
    separator = next((one for one in (",", ";", "\t") if one in head), ",")
    rows: list[Row] = []
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        key = next((one for one in _MEDIA_KEYS if one in columns), None)
        caption = next((one for one in _CAPTION_KEYS if one in columns), None)
        if key is None or caption is None:
            raise NoList("needs the columns file_name, and text or caption")
        for record in reader:
            place = f"{where} line {reader.line_num}"
            if not record[key]:
                raise UserError(f"{place}: needs a {key}")
            rows.append(Row(place, record[key], captions_in(record[caption], place)))
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num}: not valid CSV: {error}") from None
    return rows


def captions_in(value: Any, place: str) -> tuple[str, ...]:
    """Return the captions of one medium, written as a string, a list of them, or nothing.

    Raises:
        UserError: it is something else, or too long.
    """
    captions = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{place}: the caption must be a string, or a list of strings")
    if any(len(caption) > MAX_CAPTION for caption in captions):
        raise UserError(f"{place}: a caption is longer than {readable(MAX_CAPTION)}: shorten it")
    return tuple(text for text in map(clean, captions) if text)
