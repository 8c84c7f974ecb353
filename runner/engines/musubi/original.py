"""The trainer's options as the script that this runner grew out of passed them; pure.

It put everything on the command line and passed no more than the options that have a place in it,
leaving the others at musubi-tuner's defaults. Options that differ from those defaults follow after
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.formats.train_options import TABLE
from runner.formats.trainer_options import TRAIN, arguments_of, options

# What the script passed, in its order; with --fp8 also fp8_base, fp8_scaled and fp8_vl.
ORIGINAL = sorted(
    (name for name, option in TABLE.items() if option.original is not None),
    key=lambda name: TABLE[name].original or 0,
)


def command_line(table: Mapping[str, Any]) -> list[str]:
    """The options of train.toml as arguments: the script's own, and what differs from defaults."""
    known = options(TRAIN)
    kept = {key: table[key] for key in ORIGINAL if key in table}
    for key, value in table.items():
        if key not in kept and value != known[key].default:
            kept[key] = value
    # These say what is so without them: a logging_dir alone means TensorBoard, and LoRAs are saved
    # in the fp32 that they are trained in.
    if kept.get("log_with") == "tensorboard" and "logging_dir" in kept:
        del kept["log_with"]
    if kept.get("save_precision") == "fp32":
        del kept["save_precision"]
    if kept.get("metadata_title") == kept.get("output_name"):
        del kept["metadata_title"]
    # The trainer loads the text encoder for previews alone; the script gave this with --fp8.
    if not kept.get("fp8_base") and "sample_prompts" not in kept:
        kept.pop("fp8_vl", None)
    return arguments_of(TRAIN, kept)
