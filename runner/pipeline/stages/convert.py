"""The convert stage: write the LoRA in ComfyUI's form."""

from __future__ import annotations

from pathlib import Path

from runner.core.command import Command
from runner.core.process import last_error
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
        run_commands(context, context.plan.stage(self.name), explain=_explain)


def _explain(log: Path, code: int) -> str:
    return last_error(log).removeprefix("error: ")


CONVERT = Convert()
