"""Captions as other tools write them: names, encodings, lines, lists, folders; and hostile ones."""

from __future__ import annotations

import json
import os
import signal
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from media_factory import make_image

from runner.core.errors import UserError
from runner.data.sources import Scan, scan
from runner.data.sources.captions import CaptionOptions


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    """End a test that reads without end."""

    def expired(*_: object) -> None:
        raise TimeoutError("20 seconds are over")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _folder(folder: Path, files: dict[str, Any]) -> Path:
    """Make a folder: pictures where the content is None, else texts and JSON."""
    for number, (name, content) in enumerate(files.items()):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            make_image(file, (48 + 16 * number, 32))
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            file.write_bytes(text.encode())
    return folder


def _scan(folder: Path, captions: str = "whole", encoding: str | None = None) -> Scan:
    kind = "jsonl" if folder.is_file() else "folder"
    return scan(kind, folder, max_bytes=10**9, reading=CaptionOptions(encoding, captions))


def _captions(found: Scan) -> list[tuple[str, str | None]]:
    return [(item.name, item.caption) for item in found.media]


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


# A caption belongs to the medium whose name it has: with another ending, with the medium's own,
# in other capitals, in another Unicode form. The same name comes before a similar one.
def test_captions_are_found_under_every_usual_name(tmp_path: Path) -> None:
    files = {
        "a.jpg": None, "a.txt": "A", "b.jpg": None, "b.caption": "B", "c.jpg": None,
        "c.jpg.txt": "C", "d.jpg": None, "D.TXT": "D", f"{NFD}.jpg": None, f"{NFC}.txt": "E",
        "f.jpg": None, "F.jpg": None, "F.txt": "of F", "deep/g.jpg": None, "deep/G.txt": "G",
    }  # fmt: skip
    found = _scan(_folder(tmp_path, files))
    assert dict(_captions(found)) == {
        "F.jpg": "of F", "a.jpg": "A", "b.jpg": "B", "c.jpg": "C", "d.jpg": "D",
        f"{NFD}.jpg": "E", "f.jpg": None, "deep/g.jpg": "G",
    }  # fmt: skip
    assert found.notices == ()


# What looks like a caption and matches nothing is named, a page about the dataset is not; and a
# caption that is not taken because of another.
def test_captions_that_are_not_taken_are_named(tmp_path: Path) -> None:
    files = {
        "a.jpg": None, "a.txt": "one", "a.caption": "two", "dog1.txt": "lost", "README.txt": "x",
        "b.jpg": None, "b.txt": "same", "b.jpg.txt": "same",
    }  # fmt: skip
    found = _scan(_folder(tmp_path, files))
    assert _captions(found) == [("a.jpg", "one"), ("b.jpg", "same")]
    assert found.notices == (
        "1 caption not taken, since the media have another: a.jpg (a.txt, not a.caption).",
        "dog1.txt looks like a caption, but matches no picture or clip: rename to its name.",
    )


# An empty text does not hide the caption that a list has.
def test_a_blank_text_does_not_replace_a_written_caption(tmp_path: Path) -> None:
    files = {"a.jpg": None, "a.txt": " \n", "metadata.csv": "file_name,text\na.jpg,written\n"}
    assert _captions(_scan(_folder(tmp_path, files))) == [("a.jpg", "written")]


# Other encodings are shown as decoded, for all texts together; dataset.encoding overrides.
def test_other_encodings_are_decided_and_shown(tmp_path: Path) -> None:
    texts = {"a": "um cão em São Paulo", "b": "É um gato", "c": "o gato não está aqui"}
    files = {f"{n}.txt": t.encode("cp1252") for n, t in texts.items()}
    folder = _folder(tmp_path, {f"{n}.jpg": None for n in texts} | files)
    found = _scan(folder)
    assert [caption for _, caption in _captions(found)] == list(texts.values())
    assert found.notices == (
        "3 texts (a.txt, b.txt, c.txt) are read as cp1252 (Western European, judged by their "
        "characters); c.txt says 'o gato não está aqui'. If that is wrong, set dataset.encoding.",
    )
    other = _scan(folder, encoding="cp1250")
    assert other.media[0].caption == "um căo em Săo Paulo"
    assert "read as cp1250" in other.notices[0]


# UTF-16 is read by its mark, and said; without a mark all files in doubt are named.
def test_utf16_is_read_by_its_mark(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"a.jpg": None, "a.txt": "a café".encode("utf-16")})
    found = _scan(folder)
    assert _captions(found) == [("a.jpg", "a café")]
    assert found.notices == ("a.txt is read as utf-16: 'a café'.",)
    files = {"a.txt": b"\xff\x81\xfe\x9d\x90", "b.jpg": None, "b.txt": "cat".encode("utf-16-le")}
    with pytest.raises(UserError, match=r"a\.txt, b\.txt are not UTF-8, .*dataset\.encoding="):
        _scan(_folder(tmp_path, files))


# Line ends of Windows go; several lines stay one caption, which is said, or become what
# dataset.captions says.
def test_captions_of_several_lines(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"a.jpg": None, "a.txt": "one\r\n\r\ntwo\r\none\r\n"})
    whole = _scan(folder)
    assert _captions(whole) == [("a.jpg", "one\n\ntwo\none")]
    assert whole.notices == (
        "The caption of a.jpg has several lines: all of it is one caption; "
        "dataset.captions=first takes the first line, all each.",
    )
    assert _captions(_scan(folder, "first")) == [("a.jpg", "one")]
    every = _scan(folder, "all")
    assert _captions(every) == [("a.jpg", "one"), ("a.jpg", "two")]
    assert "each becomes an item" in every.notices[0]


# The captions of a zip are read alike, and several make several items there too.
def test_a_zip_has_the_same_captions(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "in", {"10_x/a.jpg": None, "10_x/A.caption": "one\ntwo"})
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, file.relative_to(folder))
    reading = CaptionOptions(None, "all")
    found = scan("zip", tmp_path / "m.zip", max_bytes=10**9, reading=reading)
    assert _captions(found) == [("10_x/a.jpg", "one"), ("10_x/a.jpg", "two")]
    assert found.media[0].repeats == 10


LISTS: dict[str, dict[str, Any]] = {
    "metadata.csv of the Hugging Face loaders": {
        "metadata.csv": 'file_name,text\nsub/a.jpg,"one, ""two"""\nb.jpg,B\n'
    },
    "a CSV of a European spreadsheet": {
        "metadata.csv": 'file_name;caption\r\nsub/a.jpg;"one, ""two"""\r\nb.jpg;B\r\n'
    },
    "metadata.jsonl": {
        "metadata.jsonl": '{"file_name": "sub/a.jpg", "text": "one, \\"two\\""}\n'
        '{"file_name": "b.jpg", "caption": "B"}\n'
    },
    "captions.json of diffusion-pipe": {
        "sub/captions.json": {"a.jpg": ['one, "two"']},
        "captions.json": {"b.jpg": ["B"]},
    },
    "prompts.txt and videos.txt of finetrainers": {
        "prompts.txt": 'one, "two"\nB\n',
        "images.txt": "sub/a.jpg\nb.jpg\n",
    },
    "metadata of kohya, with paths of another computer and without endings": {
        "meta_lat.json": {
            "/home/me/train/sub/a": {"caption": "one", "tags": '"two"', "train_resolution": [1]},
            "C:\\train\\b.jpg": {"tags": "B"},
        }
    },
    "JSONL of musubi-tuner": {
        "train.jsonl": '{"image_path": "sub\\\\a.jpg", "caption": "one, \\"two\\""}\n'
        '{"image_path": "D:\\\\data\\\\b.jpg", "caption": "B"}\n'
    },
    "JSON with a row for each medium": {
        "train.json": [
            {"image_path": "sub/a.jpg", "caption": 'one, "two"'},
            {"image_path": "b.jpg", "caption": "B"},
        ]
    },
}


# Each format of a list gives its media the captions it has for them.
@pytest.mark.parametrize("files", LISTS.values(), ids=list(LISTS))
def test_lists_of_other_tools_are_read(files: dict[str, Any], tmp_path: Path) -> None:
    found = _scan(_folder(tmp_path, {"sub/a.jpg": None, "b.jpg": None, **files}))
    assert _captions(found) == [("b.jpg", "B"), ("sub/a.jpg", 'one, "two"')]


# Of a list of captions the first is taken, which is said, or each makes an item.
def test_a_list_of_captions(tmp_path: Path) -> None:
    files = {"a.jpg": None, "captions.json": {"a.jpg": ["one", "two\nlines", "one"]}}
    folder = _folder(tmp_path, files)
    whole = _scan(folder)
    assert _captions(whole) == [("a.jpg", "one")]
    assert whole.notices == (
        "a.jpg has several captions: the first is taken; dataset.captions=all makes an item of "
        "each.",
    )
    assert [caption for _, caption in _captions(_scan(folder, "all"))] == ["one", "two\nlines"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image_path": "a.jpg", "caption": ["one", "two"]}\n')
    assert [caption for _, caption in _captions(_scan(rows, "all"))] == ["one", "two"]


# A list that must be right is refused if it is not; another is named, since it may be of something
# else. A text beside a medium comes before either.
def test_wrong_lists_are_named(tmp_path: Path) -> None:
    beside = {"a.jpg": None, "a.txt": "A"}
    other = {"captions.json": {"a.jpg": ["X"], "gone.jpg": ["Y"]}, "meta.json": "{", "x.json": {}}
    found = _scan(_folder(tmp_path / "1", beside | other))
    assert _captions(found) == [("a.jpg", "A")]
    text = " ".join(found.notices)
    assert "captions.json: 1 of its media are not here: gone.jpg." in text
    assert "meta.json: not valid JSON" in text
    assert "a.jpg (a.txt, not captions.json)" in text and "x.json" not in text
    for name, content, message in [
        ("metadata.csv", "name,words\na,b\n", "metadata.csv: needs the columns file_name, and"),
        ("metadata.csv", "file_name,text\nb.jpg,b\n", "line 2: there is no b.jpg"),
        ("metadata.csv", 'file_name,text\n"a.jpg,b\n', "not valid CSV"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": [1]}', "caption must be a string"),
    ]:
        with pytest.raises(UserError, match=message):
            _scan(_folder(tmp_path / message[:12], {**beside, name: content}))
    pair = {"prompts.txt": "one\ntwo\n", "videos.txt": "a.jpg\n"}
    with pytest.raises(UserError, match="has 2 captions for 1 media"):
        _scan(_folder(tmp_path / "pair", beside | pair))


# A row of JSONL without a caption, whose medium has a text beside it, is said: a default caption
# would take the place of what was written.
def test_a_text_beside_a_row_without_caption_is_named(tmp_path: Path) -> None:
    row = {"image_path": "a.jpg"}
    folder = _folder(tmp_path, {"a.jpg": None, "a.txt": "A", "rows.jsonl": row})
    found = _scan(folder / "rows.jsonl")
    assert _captions(found) == [("a.jpg", None)]
    assert "has no caption for 1 row with a text beside the medium (a.txt)" in found.notices[0]


# Paths of Windows are understood; two paths of another place never mean one file here, and no
# path leads out by its last parts.
def test_paths_of_windows_in_jsonl(tmp_path: Path) -> None:
    rows = tmp_path / "set.jsonl"
    _folder(tmp_path, {"img/a.jpg": None, "img/b.jpg": None})

    def write(*paths: str) -> Path:
        rows.write_text("".join(json.dumps({"path": p, "caption": p}) + "\n" for p in paths))
        return rows

    found = _scan(write("img\\a.jpg", "D:\\data\\img\\b.jpg", "\\\\server\\x\\img\\a.jpg"))
    assert [item.name for item in found.media] == ["img/a.jpg", "img/a.jpg", "img/b.jpg"]
    assert "D:\\data\\img\\b.jpg as img/b.jpg" in found.notices[0]
    with pytest.raises(UserError, match="would be the same file"):
        _scan(write("D:\\one\\img\\a.jpg", "D:\\two\\img\\a.jpg"))
    with pytest.raises(UserError, match="line 1: there is no"):
        _scan(write("D:\\..\\..\\img\\none.jpg"))


# Repeats come from the names of folders only if all have kohya's form and a sensible number; else
# it is said why not.
@pytest.mark.parametrize(
    ("folders", "repeats", "notice"),
    [
        (("10_ohwx dog", "2_style"), [10, 2], "names of folders: 10_ohwx dog x10, 2_style x2."),
        (("in/1_a",), [1], "in/1_a x1"),
        (("10_dog", "more"), [1, 1], "more has no such name"),
        (("10_dog", "2024_trip"), [1, 1], "2024_trip is not 1 to 100 repeats"),
        (("0_dog",), [1], "0_dog is not 1 to 100"),
        (("dogs", "cats"), [1, 1], ""),
    ],
)
def test_repeats_of_folders(
    folders: tuple[str, ...], repeats: list[int], notice: str, tmp_path: Path
) -> None:
    files: dict[str, Any] = {f"{folder}/a.jpg": None for folder in folders}
    found = _scan(_folder(tmp_path, files))
    assert [item.repeats for item in found.media] == repeats
    assert bool(found.notices) == bool(notice) and notice in " ".join(found.notices)


# Texts and lists that are no regular files, too large, nested too deep, or of absurd numbers and
# paths end in one line that names them, soon and without much memory.
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("what", ["a pipe", "a device", "sparse", "a folder's link"])
def test_texts_that_are_no_files_are_refused(name: str, what: str, tmp_path: Path) -> None:
    file = _folder(tmp_path / "in", {"a.jpg": None}) / name
    if what == "a pipe":
        os.mkfifo(file)
    elif what == "a device":
        file.symlink_to("/dev/zero")
    elif what == "sparse":
        with file.open("wb") as stream:
            stream.truncate(40 << 30)
    else:
        file.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{name} in .*: it (can't be read|has more than)"):
        _scan(file.parent)


DEEP = "[" * 200_000
HOSTILE = {
    "nested too deep": '{"file_name": "a.jpg", "text": ' + DEEP,
    "too many digits": '{"file_name": "a.jpg", "n": ' + "9" * 10_000 + "}",
    "there is no": '{"file_name": "' + "x" * 10_000 + '.jpg", "text": "a"}',
    "half of a character": '{"file_name": "a.jpg", "text": "\\ud800"}',
    "longer than": '{"file_name": "a.jpg", "text": "' + "x" * 200_000 + '"}',
}


@pytest.mark.parametrize("message", sorted(HOSTILE))
def test_hostile_json_is_refused(message: str, tmp_path: Path) -> None:
    line = HOSTILE[message]
    folder = _folder(tmp_path, {"a.jpg": None, "metadata.jsonl": line})
    with pytest.raises(UserError, match=f"metadata.jsonl line 1: .*{message}") as refused:
        _scan(folder)
    assert len(str(refused.value)) < 600
    rows = tmp_path / "rows.jsonl"
    rows.write_text(line.replace("file_name", "image_path").replace('"text"', '"caption"'))
    with pytest.raises(UserError, match=f"rows.jsonl line 1: .*{message}") as refused:
        _scan(rows)
    assert len(str(refused.value)) < 600


# Other JSON beside media, hostile or not, ends no run; it is named if it looks like captions.
@pytest.mark.parametrize("content", [DEEP, "9" * 10_000, '{"a": ' * 100_000, "[1, 2]", '"x"', ""])
def test_other_json_ends_no_run(content: str, tmp_path: Path) -> None:
    files = {"a.jpg": None, "a.txt": "A", "captions.json": content}
    found = _scan(_folder(tmp_path, files))
    assert _captions(found) == [("a.jpg", "A")]
    assert "captions.json" in " ".join(found.notices)


# A caption of megabytes, also unpacked from a small zip, is refused before it is decoded.
def test_huge_captions_are_refused(tmp_path: Path) -> None:
    make_image(tmp_path / "a.jpg")
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.jpg", "a.jpg")
        archive.writestr("a.txt", b"x" * (300 << 20))
    with pytest.raises(UserError, match=r"a\.txt in .*: it has more than 100.0 kB"):
        scan("zip", tmp_path / "m.zip", max_bytes=10**9)
