"""``python -m runner.stages.convert``: a LoRA file as ComfyUI loads it, and back."""

import sys

from runner.core.unexpected import guarded
from runner.pipeline.comfyui import command_line, main
from runner.tracking.client import without_secrets

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(guarded(command_line, without_secrets))
