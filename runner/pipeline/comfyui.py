"""Convert LoRA files to ComfyUI's form and back: ``python -m runner.stages.convert``.

It runs in a process of its own, because it needs torch: safetensors' numpy reader does not support
bf16, in which LoRAs are saved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runner.core.atomic import write_bytes
from runner.core.errors import StageError, UserError
from runner.core.process import Stopped, raise_on_signals


def convert(source: Path, destination: Path, *, reverse: bool = False) -> int:
    """Convert a LoRA file to ComfyUI's form, and write it atomically.

    Args:
        source: the LoRA file to read.
        destination: the file to write.
        reverse: convert from ComfyUI's form to musubi-tuner's.

    Returns:
        The number of tensors written.

    Raises:
        UserError: ``source`` can't be read, or is no LoRA of this model.
        StageError: ``destination`` can't be written.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    from runner.formats.lora import from_comfyui, to_comfyui

    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source} can't be read as a LoRA file: {error}") from error
    converted, described = (from_comfyui if reverse else to_comfyui)(state, metadata)
    # Not `save_file`, whose files only their owner may read.
    try:
        write_bytes(destination, save(converted, described))
    except OSError as error:
        raise StageError(f"{destination} can't be written ({error.strerror or error})") from error
    return len(converted)


def main(arguments: list[str]) -> None:
    """Convert the file that the arguments name.

    Raises:
        UserError: it can't be converted.
        StageError: the new file can't be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m runner.stages.convert",
        description="Write a LoRA file as ComfyUI loads it.",
    )
    parser.add_argument("--reverse", action="store_true", help="from ComfyUI's to musubi-tuner's")
    parser.add_argument("source", type=Path, metavar="FROM.safetensors")
    parser.add_argument("destination", type=Path, metavar="TO.safetensors")
    parsed = parser.parse_args(arguments)
    number = convert(parsed.source, parsed.destination, reverse=parsed.reverse)
    print(f"{parsed.source} -> {parsed.destination}: {number} tensors")


def command_line() -> int:
    """Run the command line.

    Returns:
        The exit code: 2 for a file that can't be converted, 1 for one that can't be written, each
        with one line on standard error.
    """
    raise_on_signals()
    try:
        main(sys.argv[1:])
    except (UserError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Stopped as stopped:
        return stopped.exit_code
    return 0
