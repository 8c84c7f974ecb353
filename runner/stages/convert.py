"""``python -m runner.stages.convert``: a LoRA file as ComfyUI loads it, and back."""

import sys

from runner.pipeline.comfyui import command_line, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command_line())
