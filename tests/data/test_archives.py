"""Archives: zip, tar and 7z alike, names in any code page, and what is refused of hostile ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import signal
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from conftest import compose, tree
from media_factory import key_of, make_clip, make_image, with_corrections

from runner.core.errors import UserError
from runner.data.ingest import ScanOptions, scan_sources
from runner.data.report.image_statistics import measure_all
from runner.data.select import Source
from runner.data.sources import Scan, check_archive, locate, scan, unpack
from runner.storage.bulk_writer import BulkWriter
from runner.storage.shared_cache import SharedCache

BIG = 10**9
TAR_MODES = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}
SECONDS = 10


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A hostile file that blocks or never ends fails its test."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    make_image(folder / "b.png")
    make_image(folder / "deep" / "日本 é.jpg", (80, 40))
    make_clip(folder / "deep" / "c.mp4", 13)
    (folder / "b.txt").write_text("a picture")
    (folder / "deep" / "日本 é.txt").write_text("a place")
    (folder / "deep" / "c.txt").write_text("a jump")
    (folder / "empty.txt").write_text("")
    return folder


def as_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))


def as_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path, TAR_MODES[path.suffix]) as archive:  # type: ignore[call-overload]
        archive.add(folder, "./")


def as_7z(path: Path, folder: Path) -> None:
    from py7zr import SevenZipFile

    with SevenZipFile(path, "w") as archive:
        archive.writeall(folder, ".")


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "m.zip": as_zip,
    "m.tar": as_tar,
    "m.tar.gz": as_tar,
    "m.tgz": as_tar,
    "m.tar.bz2": as_tar,
    "m.tar.xz": as_tar,
    "m.7z": as_7z,
}


def found_in(path: Path, max_bytes: int = BIG) -> Scan:
    kind, place = locate(str(path), cwd=path.parent)
    return scan(kind, place, max_bytes=max_bytes)


def seen(found: Scan) -> list[tuple[object, ...]]:
    return [(i.name, i.media_kind, i.sha256, i.size, i.frames, i.caption) for i in found.items]


def refused(path: Path, message: str, max_bytes: int = BIG) -> None:
    with pytest.raises(UserError, match=message) as caught:
        found_in(path, max_bytes)
    assert "\n" not in str(caught.value)


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


# A real run has its media in the cache then, the very bytes; the next one reads none of them again,
# and a look at a lost entry or at a picture for the report finds it in the archive.
@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_is_unpacked_into_the_cache(name: str, media: Path, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / name, media)
    os.utime(tmp_path / name, ns=(1, 1))

    def ingest() -> Source:
        config = compose(f"dataset.path={tmp_path / name}", "dataset.target_frames=[13]")
        return scan_sources(config, tmp_path, store, ScanOptions(keep=True))[0]

    store = SharedCache(tmp_path / "outputs" / "cache")
    source = ingest()
    for item in source.items:
        entry = store.path("media", key_of(item))
        assert entry.read_bytes() == (media / item.name).read_bytes()
        entry.unlink()
    assert [ingest().items, source.unpacked] == [source.items, 3]
    with BulkWriter(store, "media", "a test") as writer:
        unpack(with_corrections(source.items), writer, lambda _: None)
    assert all(store.has("media", key_of(item)) for item in source.items)
    assert len(measure_all(with_corrections(source.items), tmp_path / "looks", keep=False)) == 3
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
    assert len(found_in(tmp_path / name).items) == 30
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


def raw_zip(path: Path, members: dict[bytes, bytes], extra: bytes = b"") -> None:
    """A zip whose names are these bytes, without a word on their encoding."""
    out, central = io.BytesIO(), io.BytesIO()
    for name, data in members.items():
        head = struct.pack("<HHHHHIII", 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data))
        lengths = struct.pack("<HH", len(name), len(extra))
        central.write(b"PK\1\2\x14\0" + head + lengths + bytes(10))
        central.write(struct.pack("<I", out.tell()) + name + extra)
        out.write(b"PK\3\4" + head + lengths + name + extra + data)
    start, length = out.tell(), central.tell()
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), length, start, 0)
    path.write_bytes(out.getvalue() + central.getvalue() + b"PK\5\6" + end)


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
    assert [(i.name, i.caption) for i in found.items] == [(name, "words") for name in sorted(names)]
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
    assert [item.name for item in found.items] == ["新しい/ソ/能.jpg", "新しい/表情.jpg"]
    assert "cp932" in found.notices[0]


# A name that is also given in UTF-8 in an extra field is that one.
def test_a_name_given_twice_is_unicode(tmp_path: Path) -> None:
    name, told = b"\x94L.jpg", "猫.jpg".encode()
    value = b"\1" + zlib.crc32(name).to_bytes(4, "little") + told
    extra = struct.pack("<HH", 0x7075, len(value)) + value
    raw_zip(tmp_path / "m.zip", {name: make_image(tmp_path / "a.jpg").read_bytes()}, extra)
    found = found_in(tmp_path / "m.zip")
    assert ([item.name for item in found.items], found.notices) == (["猫.jpg"], ())


# Safety is judged of what the names say once they are decoded.
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"..\\..\\a.jpg", "leads out"),
        ("写真\\..\\..\\a.jpg".encode("cp932"), "leads out"),
        (b"\\\\server\\a.jpg", "absolute"),
        (b"\\a.jpg", "absolute"),
        (b"C:\\a.jpg", "absolute"),
        (b"a.jpg\0.txt", "NUL"),
    ],
)
def test_safety_is_judged_after_decoding(name: bytes, message: str, tmp_path: Path) -> None:
    raw_zip(tmp_path / "m.zip", {name: b"x"})
    refused(tmp_path / "m.zip", message)


def tar_member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data) if kind == tarfile.REGTYPE else 0, kind
    member.linkname = "/etc/passwd"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


# A tar that could harm, or that lies, is refused as a zip is, packed or not.
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_member("/etc/a.png"), "absolute"),
        (tar_member("../a.png"), "leads out"),
        (tar_member("a\\..\\..\\b.png"), "leads out"),
        (tar_member("a.png", kind=tarfile.SYMTYPE), "link or a special"),
        (tar_member("a.png", kind=tarfile.LNKTYPE), "link or a special"),
        (tar_member("a.png", kind=tarfile.FIFOTYPE), "link or a special"),
        (tar_member("a.png", kind=tarfile.CHRTYPE), "link or a special"),
        (tar_member("a.png")[:1024] + tar_member("./a.png"), "twice"),
        (tar_member("a.png", bytes(200_000)), r"0\.0002 GB unpacked, over .* dataset\.max_archive"),
    ],
)
def test_dangerous_tars_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.tar").write_bytes(data)
    refused(tmp_path / "m.tar", message, 1000)
    (tmp_path / "m.tar.gz").write_bytes(gzip.compress(data))
    refused(tmp_path / "m.tar.gz", message.replace(r"0\.0002", ".*"), 10**5)


def lying_size(size: bytes) -> bytes:
    """A tar member of another size than it has, with the right checksum."""
    head = bytearray(tar_member("a.png")[:512])
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + tar_member("b.png")


# Sizes below zero or beyond the file's end, a damaged header and a missing end are damage: nothing
# is left out in silence, and nothing read for ever.
@pytest.mark.parametrize(
    "data",
    [
        lying_size(b"\xff" * 12),
        lying_size(b"77777777777\0"),
        lying_size(b"\x80" + b"\x7f" * 11),
        tar_member("a.png")[:1024] + b"damaged header".ljust(512, b"x") + bytes(1024),
        tar_member("a.png")[:1024],
        tar_member("a.png", bytes(5000))[:2000],
        b"",
        b"no tar",
        bytes(10240) + b"x",
    ],
)
def test_tars_that_lie(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.tar").write_bytes(data)
    refused(tmp_path / "m.tar", "damaged|holds no picture")


# A header that is said to be gigabytes long, in a file that is large for being empty, is not read.
def test_a_header_without_end(tmp_path: Path) -> None:
    head = bytearray(tar_member("a.png", kind=tarfile.XHDTYPE)[:512])
    head[124:136] = b"\x80" + (10**11).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "m.tar").write_bytes(head)
    os.truncate(tmp_path / "m.tar", 2 * 10**11)
    refused(tmp_path / "m.tar", "damaged")


# What is cut, damaged, no tar inside or a bomb is refused, and the temporary file goes with it.
@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz"])
def test_damaged_compression(
    ending: str, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    path = tmp_path / f"m.{ending}"
    as_tar(path, media)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    refused(path, "no tar.* archive, or a damaged one")
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 0xFF]) + whole[201:])
    refused(path, "no tar.* archive, or a damaged one|is damaged or cut")
    compress = COMPRESS[ending]
    path.write_bytes(compress(b"words"))
    refused(path, "holds no tar archive")
    path.write_bytes(compress(bytes(10**7)))
    refused(path, "holds no tar archive")
    path.write_bytes(compress(tar_member("a.png", bytes(10**7))))
    refused(path, r"GB unpacked, over the limit of 0\.001 GB", 10**6)
    assert list((tmp_path / "temporary").iterdir()) == []


# A tar that unpacks to hundreds of times its size is no dataset, whatever the limit allows.
def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.data.sources.archive._BOMB_BYTES", 10**6)
    (tmp_path / "m.tar.gz").write_bytes(gzip.compress(tar_member("a.png", bytes(10**7))))
    refused(tmp_path / "m.tar.gz", "is a bomb")
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**7))
    refused(tmp_path / "m.zip", "is a bomb")


# A 7z that is damaged, encrypted, over the limit or none is one line.
def test_seven_zips_that_cannot_be_read(media: Path, tmp_path: Path) -> None:
    from py7zr import SevenZipFile

    path = tmp_path / "m.7z"
    as_7z(path, media)
    refused(path, r"GB unpacked, over the limit", 1000)
    whole = path.read_bytes()
    for at in (40, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        refused(path, "no 7z archive, or a damaged one")
    for cut in (10, 100, len(whole) - 5):
        path.write_bytes(whole[:cut])
        refused(path, "no 7z archive, or a damaged one")
    with SevenZipFile(path, "w", password="secret") as archive:
        archive.writeall(media, "m")
    refused(path, "is encrypted")
    link = tmp_path / "links" / "a.png"
    link.parent.mkdir()
    link.symlink_to("/etc/passwd")
    with SevenZipFile(path, "w") as archive:
        archive.write(link, "a.png")
    refused(path, "link or a special")


# A member whose compression is damaged leaves out that item; so do its captions, named.
@pytest.mark.parametrize(
    "packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED]
)
def test_damaged_members(packing: int, tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    picture = make_image(tmp_path / "a.png").read_bytes()
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, picture)
        archive.writestr("b.txt", os.urandom(400).hex())
        offsets = {one.filename: one.header_offset + 30 + 5 for one in archive.infolist()}
    whole = path.read_bytes()

    def damage(name: str) -> None:
        at = offsets[name] + 14
        path.write_bytes(whole[:at] + bytes(16) + whole[at + 16 :])

    damage("a.png")
    found = found_in(path)
    assert [item.name for item in found.items] == ["b.png"]
    assert found.ignored[0][0] == "a.png" and "can't be read" in found.ignored[0][1]
    damage("b.txt")
    refused(path, r"b\.txt in .* can't be read")


# Only regular files are read: a pipe would block, a device never ends.
@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.7z", "m.jsonl", "m"])
def test_special_files_are_no_sources(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "is not a regular file")
    (tmp_path / f"link-{name}").symlink_to("/dev/zero")
    refused(tmp_path / f"link-{name}", "is not a regular file")
    refused(Path("/dev/zero"), "is not a regular file")


# Archives that can't be read are named with what to do; so is what only looks like one.
def test_other_archives_are_named(tmp_path: Path) -> None:
    for name, data, message in (
        (
            "m.rar",
            b"Rar!\x1a\x07\x01\x00",
            "is a RAR archive, which can't be read here: pack it as",
        ),
        ("m.zip", b"Rar!\x1a\x07\x01\x00", "is a RAR archive"),
        ("m.tar.zst", b"\x28\xb5\x2f\xfd", "is a Zstandard archive"),
        ("m.txt", b"words", r"is not a source of media: give a \.zip, \.tar"),
        ("m.7z", b"words", "is no zip archive, or a damaged one"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, message)


# A disk that fills up while an archive is unpacked is one line that names the folder.
def test_no_space_to_unpack(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tar(tmp_path / "m.tar.gz", media)
    with io.FileIO(os.open("/dev/full", os.O_RDWR), "r+") as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
        refused(tmp_path / "m.tar.gz", r"can't be unpacked into .* \(No space left.* TMPDIR")


# A tar is read where it lies: nothing is copied before a member is.
def test_a_tar_needs_no_space(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tar(tmp_path / "m.tar", media)
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    began = time.monotonic()
    check_archive(tmp_path / "m.tar", BIG)
    assert len(found_in(tmp_path / "m.tar").items) == 3
    assert time.monotonic() - began < SECONDS
