"""What is wrong with a LoRA file that a trainer wrote, found without torch and in little memory.

Values are judged by their bits: numpy has no bf16, and a block of a tensor is read at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.core.errors import UserError
from runner.formats.safetensors_header import TensorHeader, read_header

if TYPE_CHECKING:
    import numpy as np

# The format's floating-point dtypes: bytes of a value, and the bits of its exponent, which are all
# set in NaN and infinity and in nothing else (IEEE 754; bf16 is the upper half of a float32).
_EXPONENTS = {
    "BF16": (2, 0x7F80),
    "F16": (2, 0x7C00),
    "F32": (4, 0x7F80_0000),
    "F64": (8, 0x7FF0_0000_0000_0000),
}
_BLOCK_BYTES = 1 << 23
# The matrices that begin as zeros (networks/lora.py, loha.py and lokr.py of musubi-tuner): while
# all of them are zero, the network changes nothing.
_ZERO_AT_FIRST = ("lora_up.weight", "hada_w2_a", "lokr_w2_b", "lokr_w2")


def fault(path: Path, steps: int) -> str | None:
    """Say why a finished LoRA file can't be used; None if it can.

    Args:
        path: the file.
        steps: number of steps that it was to be trained for; compared if the file says how many.

    Returns:
        The end of a sentence that begins with the file's name, or None.
    """
    try:
        header = read_header(path)
        metadata = _metadata(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    if not header:
        return "it has no tensors"
    broken: list[str] = []
    zero: list[bool] = []
    with path.open("rb") as file:
        for name, tensor in header.items():
            if tensor.dtype not in _EXPONENTS:
                continue
            finite, only_zeros = _examine(file, tensor)
            if not finite:
                broken.append(name)
            if name.endswith(_ZERO_AT_FIRST):
                zero.append(only_zeros)
    if broken:
        return (
            f"{len(broken)} of its {len(header)} tensors have values that are not finite (NaN or "
            f"infinite), {broken[0]} the first"
        )
    done = metadata.get("ss_steps", "")
    if done.isdecimal() and int(done) < steps:
        return f"it was trained for {done} of {steps} steps"
    if zero and all(zero):
        return "it changes nothing: every up matrix is zero, so no step had an effect"
    return None


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: it can't be read ({error})") from None


def _examine(file: Any, tensor: TensorHeader) -> tuple[bool, bool]:
    """Return whether all values are finite, and whether all are zero."""
    size, exponent = _EXPONENTS[tensor.dtype]
    sign = 1 << (8 * size - 1)
    finite = only_zeros = True
    for values in _blocks(file, tensor, size):
        finite = finite and not bool(((values & exponent) == exponent).any())
        only_zeros = only_zeros and not bool((values & (sign - 1)).any())
    return finite, only_zeros


def _blocks(file: Any, tensor: TensorHeader, size: int) -> Iterator[np.ndarray[Any, Any]]:
    import numpy as np

    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left > 0:
        data = file.read(min(left, _BLOCK_BYTES))
        if not data:
            return
        left -= len(data)
        yield np.frombuffer(data, f"<u{size}")
