"""Read the texts of a source: captions, and lists of them. What is read has a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from runner.core.errors import UserError
from runner.core.text import counted, named, printable, readable
from runner.data.sources.archive import READ_ERRORS
from runner.formats.text_encoding import decode_texts
from runner.formats.text_likelihood import CANDIDATES

Opener = Callable[[], BinaryIO]

# The text encoder sees about the first 5,000 characters of a caption.
MAX_CAPTION = 100_000
MAX_LIST = 64 << 20
_MAX_ALL = 512 << 20
_SHOWN = 60


@dataclass(frozen=True)
class TextFile:
    """A text to read, and the number of its bytes above which it is refused."""

    name: str
    open: Opener
    limit: int


@dataclass(frozen=True)
class ReadTexts:
    """The texts by name; the reason for those that can't be read; and notices."""

    texts: Mapping[str, str]
    failed: Mapping[str, str]
    notices: tuple[str, ...]


def clean(caption: str) -> str:
    """Return a caption with the line ends of this system, and no white space around it."""
    return caption.replace("\r\n", "\n").replace("\r", "\n").strip()


def read_texts(files: Iterable[TextFile], where: str, encoding: str | None) -> ReadTexts:
    """Read texts, whose encodings are decided for all of them together.

    Raises:
        UserError: the encoding of some can't be decided, or they are too many bytes in all.
    """
    contents: dict[str, bytes] = {}
    failed: dict[str, str] = {}
    total = 0
    for file in files:
        content = _content(file)
        if isinstance(content, str):
            failed[file.name] = content
            continue
        contents[file.name] = content
        total += len(content)
        if total > _MAX_ALL:
            raise UserError(
                f"{where}: its captions are more than {readable(_MAX_ALL)}: make a dataset of "
                "each part"
            )
    decoded = decode_texts(contents, encoding)
    if decoded.undecided:
        raise UserError(_undecided(decoded.undecided, where))
    for name in decoded.damaged:
        which = encoding or "the encoding that its mark says"
        failed[name] = f"it is not in {which}: save it as UTF-8, or set dataset.encoding"
    notices = _notices(decoded.texts, decoded.encodings, decoded.guessed)
    return ReadTexts(decoded.texts, failed, notices)


def _content(file: TextFile) -> bytes | str:
    """Return the bytes of a text, or the reason why it can't be read."""
    try:
        with file.open() as stream:
            content = stream.read(file.limit + 1)
    except READ_ERRORS as error:
        return f"it can't be read: {getattr(error, 'strerror', None) or error}"
    if len(content) > file.limit:
        return f"it has more than {readable(file.limit)}, too much for captions: shorten it"
    return content


def _undecided(names: tuple[str, ...], where: str) -> str:
    listed = ", ".join(printable(name) for name in names)
    what = "is not UTF-8, and its" if len(names) == 1 else "are not UTF-8, and their"
    return (
        f"{where}: {listed} {what} encoding can't be told: save as UTF-8, or say which it is, for "
        "example dataset.encoding=cp1252 (cp932, cp936, utf-16-le and so on)"
    )


def _notices(
    texts: Mapping[str, str], encodings: Mapping[str, str], guessed: frozenset[str]
) -> tuple[str, ...]:
    """Return one notice for each encoding other than UTF-8, with an example as it was decoded."""
    of_encoding: dict[tuple[str, bool], list[str]] = {}
    for name, encoding in encodings.items():
        of_encoding.setdefault((encoding, name in guessed), []).append(name)
    result: list[str] = []
    for (encoding, is_guess), names in of_encoding.items():
        meaning = [c.shown for c in CANDIDATES if c.codec == encoding]
        if is_guess:
            meaning.append(f"judged by {'its' if len(names) == 1 else 'their'} characters")
        how = f" ({', '.join(meaning)})" if meaning else ""
        # The text with the most different characters shows best whether the guess is right.
        name = max(names, key=lambda one: len(set(texts[one][:500])))
        example = " ".join(texts[name].split())
        said = f"'{printable(example[:_SHOWN])}{'...' if len(example) > _SHOWN else ''}'"
        remedy = " If that is wrong, set dataset.encoding." if is_guess else ""
        if len(names) == 1:
            result.append(f"{printable(name)} is read as {encoding}{how}: {said}.{remedy}")
        else:
            result.append(
                f"{counted(len(names), 'text')} ({named(map(printable, names))}) are read as "
                f"{encoding}{how}; {printable(name)} says {said}.{remedy}"
            )
    return tuple(result)
