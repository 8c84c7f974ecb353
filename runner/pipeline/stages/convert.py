"""The convert stage: the LoRA as ComfyUI loads it.

By hand: ``python -m runner.stages.convert lora.safetensors lora_comfyui.safetensors``, and back
with ``--reverse`` before the two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.core.atomic import write_bytes
from runner.core.errors import StageError, UserError

if TYPE_CHECKING:
    from runner.pipeline.executor import Context


_USAGE = "usage: python -m runner.stages.convert [--reverse] FROM.safetensors TO.safetensors"


def convert(source: Path, destination: Path, *, reverse: bool = False) -> None:
    """Write ``source`` as ComfyUI loads it to ``destination``, whole or not at all.

    With ``reverse`` ComfyUI's file is written as musubi-tuner has it.
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
    converted, told = (from_comfyui if reverse else to_comfyui)(state, metadata)
    # Not `save_file`, whose files only their owner may read.
    write_bytes(destination, save(converted, told))


def run(context: Context) -> None:
    """Convert the run's LoRA."""
    source = context.run_dir / "lora.safetensors"
    if not source.is_file():
        raise StageError(f"there is no {source} to convert")
    try:
        convert(source, context.run_dir / "lora_comfyui.safetensors")
    except UserError as error:
        raise StageError(str(error)) from error


def main() -> None:
    """The command line."""
    reverse = sys.argv[1:2] == ["--reverse"]
    files = [Path(argument) for argument in sys.argv[2 if reverse else 1 :]]
    if len(files) != 2:
        sys.exit(_USAGE)
    try:
        convert(*files, reverse=reverse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
