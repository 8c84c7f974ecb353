"""Archives: zip, tar and 7z alike, with names in any code page."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archive_factory import (
    BIG,
    MAKERS,
    as_tar,
    found_in,
    make_media,
    raw_zip,
    refused,
    seen,
    time_limit,
)
from conftest import compose, tree
from media_factory import key_of, make_image, with_corrections

from runner.data.ingest import ScanOptions, scan_sources
from runner.data.report.image_statistics import measure_all
from runner.data.select import Source
from runner.data.sources import check_archive, locate, scan, unpack
from runner.data.sources.open_archive import open_archive
from runner.storage.bulk_writer import BulkWriter
from runner.storage.shared_cache import SharedCache


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with time_limit():
        yield


@pytest.fixture
def media(tmp_path: Path) -> Path:
    return make_media(tmp_path / "media")


# An archive holds the same items as the folder that it was made of, whatever its kind; a dry run
# leaves nothing behind, in the temporary folder neither.
@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_is_read_alike(
    name: str, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    MAKERS[name](tmp_path / name, media)
    before = tree(tmp_path)
    found = found_in(tmp_path / name)
    assert seen(found) == seen(scan("folder", media, max_bytes=BIG))
    assert found.notices == ()
    assert found.source_kind == ("zip" if name == "m.zip" else "archive")
    assert tree(tmp_path) == before
    # The temporary file has no name even while it is used, so that nothing is left of it whatever
    # ends the process.
    with open_archive(tmp_path / name):
        assert tree(tmp_path) == before


# A real run has its media in the cache then, the very bytes; the next one reads none of them again,
# and a look at a lost entry or at a picture for the report finds it in the archive.
@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_is_unpacked_into_the_cache(name: str, media: Path, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / name, media)
    os.utime(tmp_path / name, ns=(1, 1))

    def ingest() -> Source:
        config = compose(f"dataset.path={tmp_path / name}", "dataset.target_frames=[13]")
        return scan_sources(config, tmp_path, store, ScanOptions(write=True))[0]

    store = SharedCache(tmp_path / "outputs" / "cache")
    source = ingest()
    for item in source.media:
        entry = store.path("media", key_of(item))
        assert entry.read_bytes() == (media / item.name).read_bytes()
        entry.unlink()
    assert [ingest().media, source.unpacked] == [source.media, 3]
    with BulkWriter(store, "media", "a test") as writer:
        unpack(with_corrections(source.media), writer, lambda _: None)
    assert all(store.has("media", key_of(item)) for item in source.media)
    assert len(measure_all(with_corrections(source.media), tmp_path / "looks", keep=False)) == 3
    assert not list((store.root / "incoming").iterdir())


# What is decompressed as a whole is so once for each look, however many members are read.
@pytest.mark.parametrize("name", ["m.tgz", "m.7z"])
def test_a_solid_archive_is_decompressed_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import py7zr

    for number in range(30):
        make_image(tmp_path / "media" / f"{number}.png", (8 + number, 8)).with_suffix(
            ".txt"
        ).write_text("words")
    MAKERS[name](tmp_path / name, tmp_path / "media")
    times: list[object] = []
    for owner, function in ((gzip, "open"), (py7zr.SevenZipFile, "extract")):
        real = getattr(owner, function)

        def noted(*given: object, real: Callable[..., object] = real, **more: object) -> object:
            times.append(given)
            return real(*given, **more)

        monkeypatch.setattr(owner, function, noted)
    monkeypatch.setattr("runner.data.sources.packed_archive._DECOMPRESS", {"gz": gzip.open})
    assert len(found_in(tmp_path / name).media) == 30
    assert len(times) == 1


# Without `auto` an archive is an archive, and `zip` is an older word for it; in a folder with
# nothing else it is found.
@pytest.mark.parametrize("name", ["m.zip", "m.tar.gz", "m.7z"])
def test_archives_are_located(name: str, media: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    MAKERS[name](inside / name, media)
    kind = "zip" if name == "m.zip" else "archive"
    for asked in ("auto", "archive", "zip"):
        for path in ("inside", f"inside/{name}"):
            assert locate(path, asked, cwd=tmp_path) == (kind, inside / name)
    (inside / "other.tar").write_bytes(b"")
    refused(inside, f"holds {name}, other.tar: say which")
    # Whatever the ending is, the content says what it is.
    (inside / name).rename(inside / "renamed.zip")
    assert locate("inside/renamed.zip", cwd=tmp_path)[0] == kind


CODE_PAGES = [
    ("cp932", ["表情1.jpg", "ソフト.jpg", "新しいフォルダー/猫.jpg"]),
    ("cp936", ["新建文件夹/照片.jpg", "女孩.jpg"]),
    ("cp950", ["許功蓋.jpg", "圖片.jpg"]),
    ("cp949", ["고양이.jpg", "새 폴더/그림1.jpg"]),
    ("cp437", ["für.jpg", "château.jpg", "café.jpg"]),
    ("cp1252", ["Größe.jpg", "São Paulo.jpg"]),
    ("cp866", ["Новая папка/кот.jpg"]),
    ("cp1251", ["Снимок экрана.jpg"]),
    ("utf-8", ["żółw.jpg", "ёлка.jpg", "日本.jpg", "cafe\u0301.jpg"]),
]


# Names without the UTF-8 flag are read as the computer that packed them wrote them, in one code
# page for all, which a notice names; the captions beside them are found.
@pytest.mark.parametrize(("code_page", "names"), CODE_PAGES)
def test_names_in_code_pages(code_page: str, names: list[str], tmp_path: Path) -> None:
    picture = make_image(tmp_path / "a.jpg").read_bytes()
    members = {}
    for name in names:
        members[name.encode(code_page)] = picture
        members[name.replace(".jpg", ".txt").encode(code_page)] = b"words"
    raw_zip(tmp_path / "m.zip", members)
    found = found_in(tmp_path / "m.zip")
    assert [(i.name, i.caption) for i in found.media] == [(name, "words") for name in sorted(names)]
    if code_page == "utf-8":
        assert found.notices == ()
    else:
        (notice,) = found.notices
        assert f"read as {code_page} (" in notice and any(name in notice for name in names)


# Windows programs write backslashes between folders; inside a character that byte is none. So in a
# tar, whose names nothing says the encoding of either.
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_backslashes_are_separators(kind: str, tmp_path: Path) -> None:
    picture = make_image(tmp_path / "a.jpg").read_bytes()
    names = ["新しい\\表情.jpg", "新しい\\ソ\\能.jpg"]
    members = {b"empty\\": b"", **{name.encode("cp932"): picture for name in names}}
    path = tmp_path / f"m.{kind}"
    if kind == "zip":
        raw_zip(path, members)
    else:
        with tarfile.open(path, "w") as archive:
            for raw, data in list(members.items())[1:]:
                member = tarfile.TarInfo(raw.decode("utf-8", "surrogateescape"))
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    found = found_in(path)
    assert [item.name for item in found.media] == ["新しい/ソ/能.jpg", "新しい/表情.jpg"]
    assert "cp932" in found.notices[0]


# A name that is also given in UTF-8 in an extra field is that one.
def test_a_name_given_twice_is_unicode(tmp_path: Path) -> None:
    name, told = b"\x94L.jpg", "猫.jpg".encode()
    value = b"\1" + zlib.crc32(name).to_bytes(4, "little") + told
    extra = struct.pack("<HH", 0x7075, len(value)) + value
    raw_zip(tmp_path / "m.zip", {name: make_image(tmp_path / "a.jpg").read_bytes()}, extra)
    found = found_in(tmp_path / "m.zip")
    assert ([item.name for item in found.media], found.notices) == (["猫.jpg"], ())


# A tar is read where it lies: nothing is copied before a member is.
def test_a_tar_needs_no_space(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tar(tmp_path / "m.tar", media)
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    check_archive(tmp_path / "m.tar", BIG)
    assert len(found_in(tmp_path / "m.tar").media) == 3
