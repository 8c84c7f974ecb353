"""Match captions to media: text files beside them, and lists in the formats of other tools."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from runner.core.errors import UserError
from runner.core.text import counted, named, printable
from runner.data.sources.caption_lists import (
    STRICT,
    NoList,
    Row,
    pairs_of_lists,
    parse_list,
    parse_pair,
)
from runner.data.sources.texts import (
    MAX_CAPTION,
    MAX_LIST,
    Opener,
    TextFile,
    clean,
    read_texts,
)
from runner.data.sources.written_paths import WrittenPaths
from runner.formats.caption_files import CAPTION_ENDINGS, LIST_ENDINGS
from runner.formats.media_types import media_kind_of

_NO_CAPTIONS = ("readme", "license", "licence", "copying", "changelog", "notice")


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are read.

    Attributes:
        encoding: of texts that are not UTF-8; None to decide.
        captions: what becomes of several captions or lines: whole, first or all.
    """

    encoding: str | None = None
    captions: str = "whole"


AS_WRITTEN = CaptionOptions()


@dataclass
class MediaCaptions:
    """The captions of each medium, several with ``dataset.captions=all``; and notices."""

    by_name: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def captions_of(
    media: Sequence[str], openers: Mapping[str, Opener], where: str, options: CaptionOptions
) -> MediaCaptions:
    """Read the captions of the media of a folder or archive.

    A text file beside a medium comes before a list; a list that must be right (metadata.jsonl and
    .csv) before other lists. A caption that is not taken because of another is noticed.

    Args:
        media: the names of the media.
        openers: opens each file of the source, by name.
        where: the source, for messages.
        options: how captions are read.

    Raises:
        UserError: a text can't be read or decoded, or a list that must be right is wrong.
    """
    result = MediaCaptions()
    beside, unmatched = match_captions(media, openers)
    used = {name for names in beside.values() for name in names}
    stems = {posixpath.splitext(name)[0] for name in media}
    pairs = [pair for pair in pairs_of_lists(list(openers)) if used.isdisjoint(pair)]
    lists = [
        name
        for name in sorted(openers, key=lambda one: (posixpath.basename(one) not in STRICT, one))
        if name.lower().endswith(LIST_ENDINGS)
        if posixpath.basename(name) in STRICT or posixpath.splitext(name)[0] not in stems
    ]
    in_pairs = [name for pair in pairs for name in pair]
    texts = read_texts(
        [TextFile(name, openers[name], MAX_CAPTION) for name in sorted(used)]
        + [TextFile(name, openers[name], MAX_LIST) for name in (*lists, *in_pairs)],
        where,
        options.encoding,
    )
    for name, why in texts.failed.items():
        if name in used or name in in_pairs or posixpath.basename(name) in STRICT:
            raise UserError(f"{printable(name)} in {where}: {why}")
        result.notices.append(f"{printable(name)} is not read as a list of captions: {why}.")
    result.notices += texts.notices
    names = _Names(media, openers)
    listed: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, rows in _rows(lists, pairs, texts.texts, where, result.notices):
        strict = posixpath.basename(name) in STRICT or name in in_pairs
        for medium, captions in _resolved(name, rows, names, strict, where, result.notices):
            of_list = listed.setdefault(medium, {})
            # A list may have a row for each caption of a medium.
            of_list[name] = tuple(dict.fromkeys((*of_list.get(name, ()), *captions)))
    _combine(result, media, beside, listed, texts.texts, options)
    result.notices += _unmatched([one for one in unmatched if one not in in_pairs])
    return result


def _combine(
    result: MediaCaptions,
    media: Sequence[str],
    beside: Mapping[str, Sequence[str]],
    listed: Mapping[str, Mapping[str, tuple[str, ...]]],
    texts: Mapping[str, str],
    options: CaptionOptions,
) -> None:
    """Choose the captions of each medium."""
    passed_over: list[str] = []
    lines: list[str] = []
    several: list[str] = []
    for name in media:
        found: list[tuple[str, tuple[str, ...]]] = [
            (text, (clean(texts[text]),)) for text in beside.get(name, ())
        ]
        found += listed.get(name, {}).items()
        written = [one for one in found if any(one[1])]
        if not written:
            if found:
                result.by_name[name] = ("",)
            continue
        source, captions = written[0]
        passed_over += [
            f"{printable(name)} ({printable(source)}, not {printable(other)})"
            for other, differing in written[1:]
            if differing != captions
        ]
        if len(captions) > 1:
            several.append(printable(name))
        elif len(split_lines(captions[0])) > 1:
            lines.append(printable(name))
        result.by_name[name] = chosen(captions, options)
    if passed_over:
        result.notices.append(
            f"{counted(len(passed_over), 'caption')} not taken, since the media have another: "
            f"{named(passed_over)}."
        )
    result.notices += several_notices(lines, several, options)


def several_notices(
    lines: Sequence[str], several: Sequence[str], options: CaptionOptions
) -> Iterator[str]:
    """Yield notices on media with captions of several lines, and with several captions."""
    taken = {
        "first": "the first is taken (dataset.captions=first)",
        "all": "each becomes an item (dataset.captions=all)",
    }.get(options.captions)
    if lines:
        default = "all of it is one caption; dataset.captions=first takes the first line, all each"
        yield (
            f"The {_captions(lines)} of {named(lines)} {_have(lines)} several lines: "
            f"{taken or default}."
        )
    if several:
        default = "the first is taken; dataset.captions=all makes an item of each"
        what = "has" if len(several) == 1 else "have"
        yield f"{named(several)} {what} several captions: {taken or default}."


def _captions(names: Sequence[str]) -> str:
    return "caption" if len(names) == 1 else "captions"


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def split_lines(caption: str) -> list[str]:
    """Return the lines of a caption that are not blank."""
    return [line.strip() for line in caption.split("\n") if line.strip()]


def chosen(captions: tuple[str, ...], options: CaptionOptions) -> tuple[str, ...]:
    """Return the captions that are used of those found for a medium, at least one."""
    if options.captions == "whole":
        return captions[:1]
    parts = captions if len(captions) > 1 else tuple(split_lines(captions[0]))
    distinct = tuple(dict.fromkeys(parts))
    return distinct[:1] if options.captions == "first" else distinct


def match_captions(
    media: Sequence[str], names: Iterable[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Match text files to the media that they lie beside.

    A caption is named as its medium, with or without the medium's ending. Names that differ in
    Unicode form, or in small and capital letters, match where no file's name is the same.

    Returns:
        The text files of each medium, the best first; and those that match none.
    """
    of_media: list[dict[str, list[tuple[str, bool]]]] = [{}, {}, {}]
    for name in media:
        for stem, is_whole in ((posixpath.splitext(name)[0], False), (name, True)):
            for level, key in enumerate(_keys(stem)):
                of_media[level].setdefault(key, []).append((name, is_whole))
    ranked: dict[str, list[tuple[int, bool, int, str]]] = {}
    unmatched: list[str] = []
    for name in names:
        stem, ending = posixpath.splitext(name)
        if ending.lower() not in CAPTION_ENDINGS:
            continue
        for level, key in enumerate(_keys(stem)):
            if key in of_media[level]:
                for one, is_whole in of_media[level][key]:
                    order = CAPTION_ENDINGS.index(ending.lower())
                    ranked.setdefault(one, []).append((level, is_whole, order, name))
                break
        else:
            unmatched.append(name)
    # Of a.txt and a.TXT the first has the usual ending.
    matched = {
        one: [name for *_, name in sorted(found, key=lambda f: (f[:3], f[3].swapcase()))]
        for one, found in ranked.items()
    }
    return matched, sorted(unmatched)


def _keys(stem: str) -> tuple[str, str, str]:
    folder, name = posixpath.split(unicodedata.normalize("NFC", stem))
    folded = unicodedata.normalize("NFC", name.casefold())
    return stem, posixpath.join(folder, name), posixpath.join(folder, folded)


def _unmatched(names: Sequence[str]) -> Iterator[str]:
    left = [
        printable(name)
        for name in names
        if not posixpath.basename(name).lower().startswith(_NO_CAPTIONS)
    ]
    if left:
        what = "looks like a caption, but matches" if len(left) == 1 else "look like captions, but"
        rest = "" if len(left) == 1 else " match"
        yield f"{named(left, 20)} {what}{rest} no picture or clip: rename to its name."


def _is_named_as_list(name: str) -> bool:
    return posixpath.basename(name).lower().startswith(("caption", "meta", "prompt"))


def _rows(
    lists: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    texts: Mapping[str, str],
    where: str,
    notices: list[str],
) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each list, by its name."""
    for name in lists:
        if name not in texts:
            continue
        strict = posixpath.basename(name) in STRICT
        try:
            yield name, parse_list(name, texts[name], f"{where}/{printable(name)}")
        except NoList as error:
            if strict:
                raise UserError(f"{where}/{printable(name)}: {error or 'lists no media'}") from None
            if _is_named_as_list(name):
                notices.append(
                    f"{printable(name)} is not a list of captions in a format that is read."
                )
        except UserError as error:
            if strict:
                raise
            notices.append(f"Not read as a list of captions: {error}.")
    for prompts, media in pairs:
        yield media, parse_pair(texts[prompts], texts[media], f"{where}/{printable(prompts)}")


class _Names:
    """Finds media by the names that lists give them: in any Unicode form, or without ending."""

    def __init__(self, media: Sequence[str], openers: Mapping[str, Opener]) -> None:
        self.files = openers
        self._by_form = {unicodedata.normalize("NFC", name): name for name in media}
        self._by_stem: dict[str, list[str]] = {}
        for name in media:
            stem = posixpath.splitext(unicodedata.normalize("NFC", name))[0]
            self._by_stem.setdefault(stem, []).append(name)

    def find(self, folder: str, written: str, *, stems: bool) -> str | None:
        """Return the file of a name written in a list of ``folder``, or of the whole source."""
        for base in dict.fromkeys((folder, "")):
            place = posixpath.normpath(posixpath.join(base, written))
            if place in self.files:
                return place
            form = unicodedata.normalize("NFC", place)
            if form in self._by_form:
                return self._by_form[form]
            if stems and len(found := self._by_stem.get(form, [])) == 1:
                return found[0]
        return None


def _resolved(
    name: str, rows: Sequence[Row], names: _Names, strict: bool, where: str, notices: list[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the medium and captions of each row of a list."""
    folder = posixpath.dirname(name)
    paths = WrittenPaths(lambda written: names.find(folder, written, stems=not strict))
    shown = f"{where}/{printable(name)}"
    absent: list[str] = []
    found = 0
    for row in rows:
        medium = paths.resolve(row.media)
        if medium is None and strict:
            raise UserError(_not_there(row, folder, paths))
        if medium is None:
            absent.append(printable(row.media[:200]))
            continue
        found += 1
        yield medium, row.captions
    if absent and (found or _is_named_as_list(name) or any(map(media_kind_of, absent))):
        how = "of its media are not here" if found else "names no media that are here"
        count = f"{len(absent)} {how}" if found else how
        notices.append(f"{shown}: {count}: {named(absent, 3)}.")
    notices += paths.notices(shown)


def _not_there(row: Row, folder: str, paths: WrittenPaths) -> str:
    if row.media in paths.ambiguous:
        one, other = (printable(path[:200]) for path in (row.media, paths.ambiguous[row.media]))
        return f"{row.place}: {one} and {other} would be the same file here"
    place = posixpath.normpath(posixpath.join(folder, row.media))
    return f"{row.place}: there is no {printable(place[:200])}"
