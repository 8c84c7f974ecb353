"""Archives that could harm, lie or are damaged: one line each, in time, and nothing left."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archive_factory import (
    MAKERS,
    as_7z,
    as_tar,
    found_in,
    make_media,
    raw_zip,
    refused,
    tar_member,
    time_limit,
)
from media_factory import make_image

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with time_limit():
        yield


@pytest.fixture
def media(tmp_path: Path) -> Path:
    return make_media(tmp_path / "media")


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


# A header that is said to be gigabytes long is not read.
def test_a_header_without_end(tmp_path: Path) -> None:
    head = bytearray(tar_member("a.png", kind=tarfile.XHDTYPE)[:512])
    head[124:136] = b"\x80" + (10**11).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "m.tar").write_bytes(head + bytes(3 << 20))
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
    assert [item.name for item in found.media] == ["b.png"]
    assert found.ignored[0][0] == "a.png" and "can't be read" in found.ignored[0][1]
    damage("b.txt")
    refused(path, r"b\.txt in .* can't be read")


# So if its own header lies: of the name's encoding, or of gigabytes that decompressing it takes.
def test_members_whose_headers_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    picture = make_image(tmp_path / "a.png").read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name in ("é1.png", "é2.png", "c.png"):
            archive.writestr(name, picture)
        first, second, _ = (one.header_offset + 30 for one in archive.infolist())
    data = bytearray(path.read_bytes())
    data[first] = 0xFF
    data[second + 7 + 5 : second + 7 + 9] = b"\xff" * 4
    path.write_bytes(data)
    found = found_in(path)
    assert [item.name for item in found.media] in (["c.png"], ["c.png", "é2.png"])
    assert found.ignored[0] == ("é1.png", "can't be read: its name is damaged")


# Only regular files are read: a pipe would block, a device never ends.
@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.7z", "m.jsonl", "m"])
def test_special_files_are_no_sources(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "is not a regular file")
    (tmp_path / f"link-{name}").symlink_to("/dev/zero")
    refused(tmp_path / f"link-{name}", "is not a regular file")
    refused(Path("/dev/zero"), "is not a regular file")


# So is an archive of which most was never written, however large it says it is.
@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.7z"])
def test_hollow_archives_are_not_read(name: str, media: Path, tmp_path: Path) -> None:
    MAKERS[name](tmp_path / name, media)
    os.truncate(tmp_path / name, 10**11)
    refused(tmp_path / name, "more than half of it was never written: get it again")


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
