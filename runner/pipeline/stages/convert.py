"""The convert stage: the LoRA as ComfyUI loads it.

By hand: ``python -m runner.stages.convert lora.safetensors lora_comfyui.safetensors``, and back
with ``--reverse`` before the two.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runner.core.atomic import write_bytes
from runner.core.command import Command
from runner.core.errors import StageError, UserError
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, StagePlan
from runner.pipeline.stages.base import LORA, Stage

COMFYUI_LORA = "lora_comfyui.safetensors"

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


class Convert(Stage):
    name = "convert"
    needs = (LORA,)
    makes = (COMFYUI_LORA,)

    def plan(self, planning: Planning) -> StagePlan:
        inputs = planning.inputs
        path = inputs.python_path
        command = Command(
            (inputs.python, "-m", "runner.stages.convert", LORA, COMFYUI_LORA),
            set_env=(("PYTHONPATH", path),) if path else (),
        )
        notices: tuple[str, ...] = ()
        if inputs.config.network.name == "lokr":
            notices = (
                "network=lokr: ComfyUI has q, k and v in one layer, which three Kronecker products "
                "don't make, so they are written out whole: 2.7 GB of bf16 if all are trained.",
            )
        return StagePlan(
            self.name,
            COMFYUI_LORA,
            "to run",
            commands=(command,),
            outputs=(COMFYUI_LORA,),
            notices=notices,
        )

    def run(self, context: Context) -> None:
        """Convert the run's LoRA."""
        source = context.run_dir / LORA
        if not source.is_file():
            raise StageError(f"there is no {source} to convert")
        try:
            convert(source, context.run_dir / COMFYUI_LORA)
        except UserError as error:
            raise StageError(str(error)) from error


CONVERT = Convert()


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
