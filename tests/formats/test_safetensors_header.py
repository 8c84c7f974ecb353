"""Headers of safetensors files: read alone, and damaged files named in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.core.errors import UserError
from runner.formats.safetensors_header import DamagedFileError, TensorHeader, read_header


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.safetensors"
    tensors = {"a.weight": torch.full((2, 3), 1.5, dtype=torch.bfloat16), "b": torch.tensor(2.5)}
    save_file(tensors, file, {"format": "pt"})
    return file


# The header has what the library wrote, without the metadata, and where each tensor lies.
def test_header(weights: Path) -> None:
    header = read_header(weights)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()} == {
        "a.weight": ("BF16", (2, 3)),
        "b": ("F32", ()),
    }
    data = weights.read_bytes()
    assert data[header["a.weight"].start : header["a.weight"].end] == struct.pack(
        "<6H", *[0x3FC0] * 6
    )
    assert data[header["b"].start : header["b"].end] == struct.pack("<f", 2.5)


# No tensor is read: a file of 300 GB that is all hole is read as fast as a small one.
def test_only_the_header_is_read(tmp_path: Path) -> None:
    file, size = tmp_path / "large.safetensors", 300 * 10**9
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + size)
    start = 8 + len(text)
    assert read_header(file) == {"a": TensorHeader("U8", (size,), start, start + size)}


# A file that is cut, in its tensors or already in its header, is named with the bytes that are
# missing.
def test_a_cut_file(weights: Path) -> None:
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length, missing in ((len(data) - 1, 1), (header, len(data) - header), (header - 5, 5)):
        weights.write_bytes(data[:length])
        with pytest.raises(DamagedFileError) as error:
            read_header(weights)
        or_more = "" if length >= header else " or more"
        line = f"{weights}: the file is cut, {missing} bytes{or_more} are missing"
        assert str(error.value) == line


# Anything else is named as what it is not, in one line.
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is not a safetensors file (0 bytes)"),
        (b"PK\x03\x04 a pickle of PyTorch", "is not a safetensors file (24 bytes)"),
        (b"version https://git-lfs.github.com", "is not a safetensors file (34 bytes)"),
        (b"\x05" + b"\0" * 7 + b"{nope", "has a safetensors header that cannot be read"),
        (b"\x0a" + b"\0" * 7 + b'{"a": [1]}', "has a safetensors header that cannot be read"),
        (b"\x0a" + b"\0" * 7 + b'{"a":"\xff"} ', "has a safetensors header that cannot be read"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, line: str) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(DamagedFileError) as error:
        read_header(file)
    assert str(error.value) == f"{file}: it {line}"


# So is a header whose entries are no tensors.
@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": 5, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1]},
    ],
)
def test_entries_that_are_no_tensors(tmp_path: Path, entry: object) -> None:
    file = tmp_path / "weights.safetensors"
    text = json.dumps({"a": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"0000")
    with pytest.raises(DamagedFileError, match="a safetensors header that cannot be read"):
        read_header(file)


# A missing file is one line too, but no damaged one.
def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read") as error:
        read_header(tmp_path / "none")
    assert not isinstance(error.value, DamagedFileError)
