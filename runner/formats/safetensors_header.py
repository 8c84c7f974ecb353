"""Read the header of a safetensors file: names, dtypes and shapes, without tensors or torch.

The format is described at https://huggingface.co/docs/safetensors: eight bytes give the header's
length (little-endian), then comes the header, a JSON object of tensors with dtype, shape and the
offsets of their bytes, then the bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from runner.core.errors import UserError

# The library refuses longer headers, so a larger number is no header's length.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as the header describes it.

    Attributes:
        dtype: the format's name, such as BF16.
        shape: its shape.
        start: position in the file of its first byte.
        end: position after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class DamagedFileError(UserError):
    """A file that is no complete safetensors file."""


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Read the header of a safetensors file; its tensors are not read.

    Returns:
        The tensors by name.

    Raises:
        DamagedFileError: the file is cut, or is no safetensors file.
        UserError: it cannot be opened.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if start[8:] != b"{" or not 2 <= length <= _LONGEST_HEADER:
                raise DamagedFileError(f"{path}: it is not a safetensors file ({size:,} bytes)")
            if 8 + length > size:
                _raise_cut(path, 8 + length - size, "bytes or more")
            text = start[8:] + file.read(length - 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        header = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFileError(f"{path}: it has a safetensors header that cannot be read") from None
    end = max((tensor.end for tensor in header.values()), default=0)
    if end > size:
        _raise_cut(path, end - size, "bytes")
    return header


# The formats of struct; a BF16 is the upper half of an F32.
_NUMBERS = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q"}


def read_scalar(path: Path, tensor: TensorHeader) -> float:
    """Read a tensor of one number, which torch makes I64 of a whole one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has several values, or is of another dtype.
    """
    with path.open("rb") as file:
        file.seek(tensor.start)
        data = file.read(min(tensor.end - tensor.start, 9))
    form = _NUMBERS.get(tensor.dtype)
    if tensor.dtype == "BF16":
        form, data = "<f", b"\0\0" + data
    if form is None or len(data) != struct.calcsize(form):
        raise ValueError("not a single number")
    return float(struct.unpack(form, data)[0])


def _tensor(entry: Any, first: int) -> TensorHeader:
    """Read a tensor's entry; ``first`` is the position of the first byte after the header."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not all(isinstance(n, int) for n in (*shape, *offsets)):
        raise TypeError
    start, end = offsets
    if not 0 <= start <= end:
        raise ValueError
    return TensorHeader(dtype, tuple(shape), first + start, first + end)


def _raise_cut(path: Path, missing: int, unit: str) -> NoReturn:
    raise DamagedFileError(f"{path}: the file is cut, {missing:,} {unit} are missing")
