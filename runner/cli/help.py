"""The text of ``python -m runner --help``; Hydra's own help takes a second to list the groups."""

from __future__ import annotations

import textwrap
from pathlib import Path

from runner.config.groups import groups

_TEXT = """\
Trains HunyuanVideo 1.5 LoRAs from one composed config, and records every run in MLflow.

usage: python -m runner [GROUP=CHOICE ...] [KEY=VALUE ...]      one run
       python -m runner -m KEY=A,B,C ...                        a sweep

Groups (each choice is a short file in conf/):
{groups}

The ten most used options:
  dataset.path=mydata.zip        archive, folder or JSONL of pictures, clips, captions
  dataset.trigger_word=ohwx      word put before every caption
  dataset.resolution=[544,960]   width and height; buckets keep the area
  dataset.target_frames=[1,25]   frames to train on, each 4N+1
  network.rank=32                rank; alpha equals it by default
  optimizer.learning_rate=1e-4   learning rate
  training.epochs=10             passes over the dataset (training.max_steps: steps instead)
  training.seed=42               -1 draws a random seed and records it
  name=my-run                    name of the run and of its folder
  dry_run=true                   show stages, commands and steps; write nothing

Examples:
  python -m runner experiment=rehearsal
  python -m runner task=i2v optimizer=adafactor precision=fp8 dataset.path=mydata.zip
  python -m runner -m network.rank=8,16,32 dataset.path=mydata.zip

Every option with its value:  python -m runner --cfg job
Compare runs:                 python -m runner.ui
Completion of `runner ...`:   eval "$(runner --shell-completion install=bash)"
Hydra's own flags:            python -m runner --hydra-help
"""


def text(conf: Path) -> str:
    """Build the help, with the groups and choices of the folder ``conf``."""
    lines: list[str] = []
    for group, names in groups(conf).items():
        if names:
            lines += textwrap.wrap(
                f"{group:<11}{', '.join(names)}",
                width=96,
                initial_indent="  ",
                subsequent_indent=" " * 13,
            )
    return _TEXT.format(groups="\n".join(lines))
