"""``python -m runner.export``: any checkpoint of a run, for ComfyUI, musubi-tuner or diffusers."""

import sys

from runner.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
