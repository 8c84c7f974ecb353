"""Sources of media: finding them, looking into them, refusing dangerous archives, copying out."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from conftest import tree
from media_factory import key_of, make_clip, make_image, make_sound, with_corrections

from runner.core.errors import UserError
from runner.data.sources import Scan, SourceMedia, check_archive, locate, scan, unpack
from runner.storage.bulk_writer import BulkWriter
from runner.storage.shared_cache import SharedCache

BIG = 10**9


def _zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    make_image(folder / "b.png")
    make_image(folder / "deep" / "er" / "a.v2.jpg", (80, 40))
    make_clip(folder / "deep" / "c.mp4", 13)
    (folder / "b.txt").write_text("a picture\n")
    (folder / "deep" / "er" / "a.v2.txt").write_bytes("\ufeffÉté".encode())
    (folder / "deep" / "c.txt").write_text("  ")
    return folder


def _unpacked(item: SourceMedia, store: SharedCache) -> bytes:
    """What is kept of an item."""
    with BulkWriter(store, "media", "a test") as writer:
        unpack(with_corrections([item]), writer, lambda _: None)
    return store.path("media", key_of(item)).read_bytes()


def _seen(found: Scan) -> list[tuple[object, ...]]:
    return [(i.name, i.media_kind, i.sha256, i.size, i.frames, i.caption) for i in found.media]


# A folder and a zip of it hold the same items, at any depth, sorted by name, captions beside them.
def test_folder_and_zip_are_seen_alike(media: Path, tmp_path: Path) -> None:
    folder = scan("folder", media, max_bytes=BIG)
    archive = scan("zip", _zip(tmp_path / "m.zip", media), max_bytes=BIG)
    assert _seen(folder) == _seen(archive)
    assert [(i.name, i.media_kind, i.size, i.frames, i.caption) for i in folder.media] == [
        ("b.png", "image", (64, 48), 1, "a picture"),
        ("deep/c.mp4", "video", (64, 48), 13, ""),
        ("deep/er/a.v2.jpg", "image", (80, 40), 1, "Été"),
    ]
    assert folder.media[1].fps == 24.0
    for item in folder.media:
        data = (media / item.name).read_bytes()
        assert (item.sha256, item.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        assert item.file == media / item.name
    assert [item.member for item in archive.media] == [item.name for item in folder.media]


# Looking changes nothing on disk, beside the source or elsewhere in its folder.
def test_scanning_writes_nothing(media: Path, tmp_path: Path) -> None:
    archive = _zip(tmp_path / "m.zip", media)
    before = tree(tmp_path)
    scan("zip", archive, max_bytes=BIG)
    scan("folder", media, max_bytes=BIG)
    assert tree(tmp_path) == before


# Progress counts up to the number of media.
def test_progress_reaches_the_end(media: Path) -> None:
    calls: list[tuple[int, int]] = []
    scan("folder", media, max_bytes=BIG, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


# Damaged media are left out with the reason; hidden and unknown files are not worth a word.
def test_damaged_media_are_reported(media: Path) -> None:
    whole = (media / "b.png").read_bytes()
    (media / "cut.png").write_bytes(whole[: len(whole) // 2])
    (media / "bad.mp4").write_bytes(b"no clip")
    (media / "broken.webp").symlink_to("nowhere")
    make_sound(media / "sound.mp4")
    (media / "notes.md").write_text("x")
    make_image(media / ".hidden.png")
    make_image(media / "__MACOSX" / "x.png")
    found = scan("folder", media, max_bytes=BIG)
    assert len(found.media) == 3
    assert [name for name, _ in found.ignored] == [
        *("bad.mp4", "broken.webp", "cut.png", "sound.mp4")
    ]
    assert dict(found.ignored)["sound.mp4"] == "can't be read: it has no video stream"
    os.mkfifo(media / "pipe.png")  # would block for ever if it were opened
    assert len(scan("folder", media, max_bytes=BIG).ignored) == 5


# A frame count is what decoding gives, not what the container says.
def test_a_clip_cut_short_is_counted_by_decoding(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "a.mkv", 40).read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) // 2])
    found = scan("folder", tmp_path, max_bytes=BIG)
    assert 1 < found.media[0].frames < 40


# A damaged member of an archive leaves out that item only.
def test_a_damaged_member_is_left_out(media: Path, tmp_path: Path) -> None:
    path = _zip(tmp_path / "m.zip", media)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("b.png").header_offset
    data[start + 30 + len("b.png") + 50] ^= 0xFF
    path.write_bytes(data)
    found = scan("zip", path, max_bytes=BIG)
    assert len(found.media) == 2 and found.ignored[0][0] == "b.png"


# Linked folders count, and folders that link to each other are entered once.
def test_links_are_followed_and_circles_end(media: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "in").symlink_to(media, target_is_directory=True)
    assert scan("folder", tmp_path / "linked", max_bytes=BIG).media[0].name == "in/b.png"
    (media / "deep" / "up").symlink_to(media, target_is_directory=True)
    assert len(scan("folder", media, max_bytes=BIG).media) == 3


# Captions in no known encoding are named; so is a source with nothing to train on.
def test_unusable_sources_are_named(media: Path, tmp_path: Path) -> None:
    (media / "b.txt").write_bytes(b"\xff\x81\xfe\x9d\x90")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8"):
        scan("folder", media, max_bytes=BIG)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no picture or clip"):
        scan("folder", empty, max_bytes=BIG)
    (empty / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no picture or clip.*a\.png: can't be read"):
        scan("folder", empty, max_bytes=BIG)
    with pytest.raises(UserError, match="holds no picture or clip"):
        scan("zip", _zip(tmp_path / "e.zip", tmp_path / "nothing"), max_bytes=BIG)


# Names outside ASCII survive a zip, with the UTF-8 flag and as UTF-8 without the flag.
def test_names_survive_archives(media: Path, tmp_path: Path) -> None:
    data = (media / "b.png").read_bytes()
    path = tmp_path / "n.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("日本 é.png", data)
        archive.writestr("日本 é.txt", "flagged")
        archive.writestr("├⌐.png", data)  # flagged: not to be read as cp437 of "é"
        archive.writestr("XXXXXX.png", data)
        archive.writestr("./dot.png", data)
        archive.writestr("./dot.txt", "dotted")
    path.write_bytes(path.read_bytes().replace(b"XXXXXX.png", "日本.png".encode()))
    found = scan("zip", path, max_bytes=BIG)
    assert {item.name: item.caption for item in found.media} == {
        "日本 é.png": "flagged",
        "日本.png": None,
        "├⌐.png": None,
        "dot.png": "dotted",
    }
    assert found.notices == ()
    for item in found.media:
        assert _unpacked(item, SharedCache(tmp_path / "store")) == data


def _member(name: str, *, mode: int = 0, data: bytes = b"x") -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info, data


# An archive that could harm, or that can't be unpacked truly, is refused as a whole.
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([_member("/etc/a.png")], "absolute"),
        ([_member("C:/a.png")], "absolute"),
        ([_member("a/../../b.png")], "leads out"),
        ([_member("..")], "leads out"),
        ([_member("..\\b.png")], "leads out"),
        ([_member("link.png", mode=stat.S_IFLNK | 0o777)], "link or a special"),
        ([_member("pipe.png", mode=stat.S_IFIFO | 0o600)], "link or a special"),
        ([_member("a.png"), _member("a.png")], "twice"),
        ([_member("a.png"), _member("./a.png")], "twice"),
        ([_member("a.png", data=bytes(2000))], r"2e-06 GB unpacked, over .* dataset\.max_archive"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_dangerous_archives_are_refused(
    tmp_path: Path, members: list[tuple[zipfile.ZipInfo, bytes]], message: str
) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in members:
            archive.writestr(info, data)
    for refuse in (lambda: check_archive(path, 1000), lambda: scan("zip", path, max_bytes=1000)):
        with pytest.raises(UserError, match=message) as caught:
            refuse()
        assert "\n" not in str(caught.value)


# So is an encrypted member, and one packed in a way that Python can't undo.
@pytest.mark.parametrize(
    ("offset", "value", "message"), [(8, 1, "encrypted"), (10, 9, "packed in a way")]
)
def test_unreadable_members_are_refused(
    tmp_path: Path, offset: int, value: int, message: str
) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"x")
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.index(b"PK\x01\x02") + offset, value)
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        check_archive(path, BIG)


# The kind is detected from the path; with nothing, too much or the wrong thing there, one line says
# so.
def test_locating(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(path: str, kind: str = "auto") -> tuple[str, str]:
        found, place = locate(path, kind, cwd=tmp_path)
        assert place.is_absolute()
        return found, str(place.relative_to(tmp_path))

    def refused(path: str, message: str, kind: str = "auto") -> None:
        with pytest.raises(UserError, match=message) as caught:
            locate(path, kind, cwd=tmp_path)
        assert "\n" not in str(caught.value)

    data = tmp_path / "data"
    data.mkdir()
    refused("data", "holds no archive and no picture")
    (data / "list.jsonl").write_text("")
    assert find("data") == ("jsonl", "data/list.jsonl")
    archive = _zip(data / "First.ZIP", media)
    assert find("data") == ("zip", "data/First.ZIP")
    assert find("data", "zip") == ("zip", "data/First.ZIP")
    assert find("data/First.ZIP") == ("zip", "data/First.ZIP")
    assert find("data/list.jsonl") == ("jsonl", "data/list.jsonl")
    assert find("./media/../media") == ("folder", "media")
    assert find("media", "folder") == ("folder", "media")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/media") == ("folder", "media")
    assert locate("anything", "sample", cwd=tmp_path)[0] == "sample"

    refused("meda", "did you mean .*/media")
    refused("Data/x.zip", "did you mean .*/data")
    refused("nothing/like/it", "there is no .*set dataset.path")
    refused("data/First.ZIP", "is a file", "folder")
    refused("media/b.txt", "not a source of media")
    refused("media", "holds none", "zip")
    refused("media", "'tar' is unknown", "tar")
    (data / "second.zip").write_bytes(b"no zip")
    refused("data", "First.ZIP, second.zip")
    refused("data/second.zip", "is no zip archive")
    archive.rename(media / "beside.zip")
    refused("media", "holds beside.zip and media such as b.png")


def _jsonl(media: Path, *lines: object) -> Path:
    path = media.parent / "lists" / "m.jsonl"
    path.parent.mkdir(exist_ok=True)
    text = (
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
    )
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


# A JSONL file names media relative to itself; one medium may stand there with two captions.
def test_jsonl(media: Path) -> None:
    path = _jsonl(
        media,
        {"video_path": "../media/deep/c.mp4", "caption": " a clip "},
        "",
        {"image_path": "../media/b.png", "caption": "one\u2028line"},
        {"path": str(media / "b.png")},
        {"image_path": "../media/b.png", "caption": "two"},
    )
    found = scan("jsonl", path, max_bytes=BIG)
    assert [(item.name, item.caption) for item in found.media] == [
        ("../media/b.png", "one\u2028line"),
        ("../media/b.png", "two"),
        ("../media/deep/c.mp4", "a clip"),
        (str(media / "b.png"), None),
    ]


# A wrong line of a JSONL file is named by its number.
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ({"caption": "x"}, "needs one of"),
        ({"path": 1}, "needs one of"),
        ({"path": "a.png", "image_path": "a.png"}, "needs one of"),
        ({"path": "../media/b.png", "caption": 1}, "caption must be"),
        ({"path": "../media/none.png"}, "there is no"),
        ({"path": "../media/b.txt"}, "not a file that path can name"),
        ({"video_path": "../media/b.png"}, "not a file that video_path can name"),
    ],
)
def test_wrong_jsonl_lines_are_named(media: Path, line: object, message: str) -> None:
    path = _jsonl(media, {"path": "../media/b.png"}, line)
    with pytest.raises(UserError, match=f"m.jsonl line 2: .*{message}"):
        scan("jsonl", path, max_bytes=BIG)


# Copies are exact; of a picture that is not RGB a PNG is kept that is.
def test_unpacking_media(media: Path, tmp_path: Path) -> None:
    from PIL import Image

    make_image(media / "alpha.png", mode="RGBA")
    archive = _zip(tmp_path / "m.zip", media)
    for kind, path in (("folder", media), ("zip", archive)):
        found, store = (
            scan(kind, path, max_bytes=BIG),
            SharedCache(tmp_path / f"store of the {kind}"),
        )
        (alpha,) = (item for item in found.media if item.mode == "RGBA")
        for item in found.media:
            kept = _unpacked(item, store)
            assert (hashlib.sha256(kept).hexdigest() == item.sha256) == (item != alpha)
        with (
            Image.open(store.path("media", key_of(alpha))) as image,
            Image.open(media / "alpha.png") as original,
        ):
            assert (image.mode, image.format) == ("RGB", "PNG")
            assert image.tobytes() == original.convert("RGB").tobytes()


# Media that changed or went since the scan are refused, and nothing is kept of them.
def test_changed_media_are_refused(media: Path, tmp_path: Path) -> None:
    archive, store = _zip(tmp_path / "m.zip", media), SharedCache(tmp_path / "store")
    items = [scan(k, p, max_bytes=BIG).media[0] for k, p in (("folder", media), ("zip", archive))]
    make_image(media / "b.png", (32, 32))
    _zip(archive, media)
    for item in items:
        with pytest.raises(UserError, match="has changed"):
            _unpacked(item, store)
    (media / "b.png").unlink()
    _zip(archive, media / "deep")
    for item in items:
        with pytest.raises(UserError, match="can't be read"):
            _unpacked(item, store)
    assert store.full_keys() == frozenset()


# Half of a character, as JSON can spell it, is reported with its line: it can't be encoded.
def test_half_a_character_is_refused(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png", (8, 8))
    (tmp_path / "m.jsonl").write_text('{"image_path": "a.png", "caption": "x \\ud83d y"}\n')
    with pytest.raises(UserError, match=r"m\.jsonl line 1: has half of a character"):
        scan("jsonl", tmp_path / "m.jsonl", max_bytes=10**9)
