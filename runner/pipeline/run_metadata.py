"""What a run's folder says about its LoRA, for the metadata of the files made from it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.core.errors import UserError
from runner.pipeline.run_folders import run_label

BASE_MODEL_VERSION = "hunyuan_video_1_5"


def run_metadata(run: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Add trigger word, base model, resolution and run id to a LoRA's metadata.

    Keys are those of Stability AI's model-spec (``modelspec.trigger_phrase``,
    ``modelspec.resolution``) and of sd-scripts (``ss_sd_model_name``, ``ss_new_sd_model_hash``, the
    SHA-256 of the base model's file); ``ss_run_id`` is the runner's own. The base model is the file
    that weights.json lists; where it lists none, what the trainer wrote stays. A file of this
    computer is named ``local:<name>``, without its folder, because LoRA files are passed on.

    Args:
        run: the run's folder; of its files, those that are missing add nothing.
        metadata: what the trainer wrote.

    Raises:
        UserError: a file of the run can't be read.
    """
    config, record, weights, training = (
        read_file(run / name) for name in ("config.yaml", "run.json", "weights.json", "train.toml")
    )
    dataset, model = config.get("dataset", {}), config.get("model", {})
    result = {"ss_base_model_version": BASE_MODEL_VERSION, **metadata}
    # Options that a source does not set are those of the dataset.
    sources = [
        {**dataset, **{key: value for key, value in source.items() if value is not None}}
        for source in dataset.get("sources") or [{}]
        if not source.get("regularisation")
    ]
    words = dict.fromkeys(str(one["trigger_word"]) for one in sources if one.get("trigger_word"))
    if words:
        result["modelspec.trigger_phrase"] = ", ".join(words)
    sizes = [one["resolution"] for one in sources if one.get("resolution")]
    # What musubi-tuner writes if nobody tells it the size.
    unknown = metadata.get("modelspec.resolution", "1280x720") == "1280x720"
    if sizes and unknown and "metadata_reso" not in training:
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        result["modelspec.resolution"] = f"{width}x{height}"
    for file in weights.get("files", []):
        named = (model.get("repository"), model.get("transformer"))
        if (file.get("repository"), file.get("file")) == named and file.get("sha256"):
            result["ss_sd_model_name"] = f"{named[0]}/{named[1]}"
            result["ss_new_sd_model_hash"] = file["sha256"]
        if (file.get("source"), file.get("part")) == ("local", "transformer"):
            result["ss_sd_model_name"] = f"local:{Path(file['file']).name}"
            result["ss_new_sd_model_hash"] = file["sha256"]
    result["ss_run_id"] = record.get("mlflow_run_id") or run_label(run)
    return result


def read_file(file: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of a run's folder; empty if there is none.

    Raises:
        UserError: it can't be read.
    """
    if not file.is_file():
        return {}
    try:
        if file.suffix == ".yaml":
            from omegaconf import OmegaConf

            # Interpolations, such as a password's, stay as they are.
            content: Any = OmegaConf.to_container(OmegaConf.load(file))
        elif file.suffix == ".toml":
            content = tomllib.loads(file.read_text("utf-8"))
        else:
            content = json.loads(file.read_text("utf-8"))
    except Exception as error:
        raise UserError(f"{file}: cannot be read ({str(error).partition(chr(10))[0]})") from None
    return content if isinstance(content, dict) else {}
