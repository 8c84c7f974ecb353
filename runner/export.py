"""``python -m runner.export``: any checkpoint of a run, for ComfyUI, musubi-tuner or diffusers."""

import sys

from runner.cli.export import main
from runner.core.unexpected import guarded
from runner.tracking.client import without_secrets

if __name__ == "__main__":
    sys.exit(guarded(main, without_secrets))
