"""The trainer's options as arguments, as the script this runner grew out of passed them; pure.

The script passed a fixed list of options and left the others at musubi-tuner's defaults. Other
options that differ from those defaults are added after that list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.formats.train_options import TABLE
from runner.formats.trainer_options import TRAIN, arguments_of, options

# The options that the script passed, in its order; with --fp8 also fp8_base, fp8_scaled and fp8_vl.
ORIGINAL = sorted(
    (name for name, option in TABLE.items() if option.original is not None),
    key=lambda name: TABLE[name].original or 0,
)


def command_line(table: Mapping[str, Any]) -> list[str]:
    """Turn the options of train.toml into arguments, leaving out most that are at defaults."""
    known = options(TRAIN)
    kept = {key: table[key] for key in ORIGINAL if key in table}
    for key, value in table.items():
        if key not in kept and value != known[key].default:
            kept[key] = value
    # The script left out what is the default: a logging_dir alone means TensorBoard, and LoRAs are
    # saved in fp32, in which they are trained.
    if kept.get("log_with") == "tensorboard" and "logging_dir" in kept:
        del kept["log_with"]
    if kept.get("save_precision") == "fp32":
        del kept["save_precision"]
    # Nor did it write anything about the training into the file.
    if kept.get("metadata_title") == kept.get("output_name"):
        del kept["metadata_title"]
        kept.pop("metadata_reso", None)
    # The trainer loads the text encoder only for previews; the script passed this with --fp8.
    if not kept.get("fp8_base") and "sample_prompts" not in kept:
        kept.pop("fp8_vl", None)
    return arguments_of(TRAIN, kept)
