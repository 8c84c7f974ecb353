"""Convert LoRA files to ComfyUI's form and back: ``python -m runner.stages.convert``.

It runs in a process of its own, because it needs torch: safetensors' numpy reader does not support
bf16, in which LoRAs are saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.core.errors import StageError, UserError
from runner.core.process import Stopped, raise_on_signals
from runner.pipeline.run_metadata import run_metadata

if TYPE_CHECKING:
    from torch import Tensor


def convert(
    source: Path, destination: Path, *, form: str = "comfyui", run: Path | None = None
) -> int:
    """Convert a LoRA file, and write it atomically; memory holds one module at a time.

    Args:
        source: the LoRA file to read.
        destination: the file to write.
        form: the form to write, as in :func:`runner.formats.lora.conversions`.
        run: the folder of the run that trained it, whose facts go into the metadata.

    Returns:
        The number of tensors written.

    Raises:
        UserError: ``source`` can't be read, or is no LoRA of this model.
        StageError: ``destination`` can't be written.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from runner.formats.dtypes import SAFETENSORS_NAMES
    from runner.formats.lora import conversions
    from runner.formats.safetensors_writer import layout_of, write_with_hashes

    try:
        opened = safe_open(source, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source} can't be read as a LoRA file: {error}") from error
    with opened as file:
        metadata = run_metadata(run, file.metadata() or {}) if run else file.metadata() or {}

        def without_values(key: str) -> Tensor:
            if key.endswith(".alpha"):
                return file.get_tensor(key)
            header = file.get_slice(key)
            if (name := header.get_dtype()) not in SAFETENSORS_NAMES:
                raise UserError(f"{key} is {name}, which no LoRA is saved in")
            dtype = getattr(torch, SAFETENSORS_NAMES[name])
            return torch.empty(header.get_shape(), dtype=dtype, device="meta")

        # Each key of the new file: how its module is made, and its leaf.
        try:
            made_by = {
                f"{one.target}.{leaf}": (one, leaf, layout_of(tensor))
                for one in conversions(file.keys(), form)
                for leaf, tensor in one.make(without_values).items()
            }
        except UserError as error:
            raise UserError(f"{source}: {str(error).removeprefix('LoRA file: ')}") from None
        made: tuple[str, dict[str, Tensor]] = ("", {})

        def tensor(key: str) -> Tensor:
            nonlocal made
            conversion, leaf, _ = made_by[key]
            if made[0] != conversion.target:
                made = conversion.target, conversion.make(file.get_tensor)
            return made[1][leaf]

        layouts = {key: layout for key, (_, _, layout) in made_by.items()}
        try:
            # Not `save_file`, whose files only their owner may read, and which needs all tensors.
            write_with_hashes(destination, layouts, tensor, metadata)
        except OSError as error:
            raise StageError(
                f"{destination} can't be written ({error.strerror or error})"
            ) from error
    return len(layouts)


def main(arguments: list[str]) -> None:
    """Convert the files that the arguments name; one that fails does not stop the others.

    Raises:
        UserError: one can't be converted.
        StageError: a new file can't be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m runner.stages.convert",
        description="Write LoRA files as ComfyUI loads them.",
    )
    parser.add_argument("--reverse", action="store_true", help="from ComfyUI's to musubi-tuner's")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="folder of the run: trigger word, base model, resolution and run id are written too",
    )
    parser.add_argument(
        "--background", action="store_true", help="at the lowest priority, in one thread"
    )
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FROM TO", help="pairs of safetensors files"
    )
    parsed = parser.parse_args(arguments)
    if len(parsed.files) % 2:
        parser.error("the files are pairs: FROM.safetensors TO.safetensors")
    if parsed.background:
        _lower_priority()
    failure: UserError | StageError | None = None
    pairs = iter(parsed.files)
    for source, destination in zip(pairs, pairs, strict=True):
        form = "musubi" if parsed.reverse else "comfyui"
        try:
            number = convert(source, destination, form=form, run=parsed.run)
            print(f"{source} -> {destination}: {number} tensors", flush=True)
        except (UserError, StageError) as error:
            if failure is not None:
                print(f"error: {failure}", file=sys.stderr)
            failure = error
    if failure is not None:
        raise failure


def _lower_priority() -> None:
    os.nice(19)
    import torch

    torch.set_num_threads(1)


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
