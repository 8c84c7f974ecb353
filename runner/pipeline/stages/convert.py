"""The convert stage: write the LoRA in ComfyUI's form."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.atomic import whole
from runner.core.command import Command
from runner.core.process import last_error
from runner.core.text import readable
from runner.formats.transformer_keys import block_projections
from runner.pipeline.checkpoints import COMFYUI, converted_name
from runner.pipeline.context import Context
from runner.pipeline.model import Planning, StagePlan
from runner.pipeline.stages.base import LORA, Stage, run_commands

COMFYUI_LORA = "lora_comfyui.safetensors"


class Convert(Stage):
    """The stage that writes ``lora_comfyui.safetensors``."""

    name = "convert"
    needs = (LORA,)
    makes = (COMFYUI_LORA,)

    def plan(self, planning: Planning) -> StagePlan:
        """Plan the conversion; pure."""
        inputs = planning.inputs
        path = inputs.python_path
        command = Command(
            (inputs.python, "-m", "runner.stages.convert", "--run", ".", LORA, COMFYUI_LORA),
            set_env=(("PYTHONPATH", path),) if path else (),
        )
        growth = lokr_growth(inputs.config)
        notices: tuple[str, ...] = ()
        if growth:
            files = 1 + checkpoints(inputs.config, steps=planning.steps, epochs=planning.epochs)
            total = (
                "" if files == 1 else f", {readable(files * growth)} for the {files} of this run"
            )
            notices = (
                "network=lokr: ComfyUI has q, k and v in one layer, which three Kronecker products "
                "don't make, so they are written out whole: "
                f"{readable(growth)} for each file for ComfyUI{total}. training.keep_last limits "
                "the checkpoints, stages.skip=[convert] leaves these files out.",
            )
        return StagePlan(
            self.name,
            COMFYUI_LORA,
            "to run",
            commands=(command,),
            outputs=(COMFYUI_LORA,),
            notices=notices,
            without_commands=f"links it into {COMFYUI}",
        )

    def run(self, context: Context) -> None:
        """Convert the run's LoRA, and link it to the checkpoints' files for ComfyUI."""
        run_commands(context, context.plan.stage(self.name), explain=_explain)
        run = context.run_dir
        last = run / COMFYUI / f"{converted_name(run, LORA)}.safetensors"
        with whole(last, sync=False) as temporary:
            try:
                os.link(run / COMFYUI_LORA, temporary)
            except OSError:
                shutil.copyfile(run / COMFYUI_LORA, temporary)


def lokr_growth(config: RunConfig) -> int:
    """Count the bytes of the q, k and v that a LoKr's file for ComfyUI has written out whole.

    0 for another network, and for the tiny model.
    """
    if config.network.name != "lokr" or config.model.source == "random":
        return 0
    trained = set()
    for module, (rows, columns) in block_projections(config.model.blocks):
        excluded = any(re.fullmatch(pattern, module) for pattern in config.network.exclude)
        if not excluded or any(re.fullmatch(pattern, module) for pattern in config.network.include):
            trained.add((module[:-1], 3 * rows * columns))
    size = 4 if config.training.save_precision == "fp32" else 2
    return size * sum(values for _, values in trained)


def checkpoints(config: RunConfig, *, steps: int, epochs: int) -> int:
    """Count the checkpoints that a run keeps besides its last one."""
    training = config.training
    kept = 0
    if training.save_every_epochs:
        number = (epochs - 1) // training.save_every_epochs
        kept += min(number, training.keep_last or number)
    if training.save_every_steps:
        number = steps // training.save_every_steps
        kept += min(number, training.keep_last or number)
    return kept


def _explain(log: Path) -> str:
    return last_error(log).removeprefix("error: ")


CONVERT = Convert()
