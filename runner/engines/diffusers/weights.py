"""Locate the weights that the embedded engine trains on: from the Hub, or random."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict
from pathlib import Path

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.paths import checkout
from runner.engines.diffusers.executables import module_command
from runner.engines.diffusers.make_weights import PARTS
from runner.formats.published_check import check_file
from runner.formats.safetensors_header import DamagedFileError
from runner.formats.train_toml import WeightPaths
from runner.hub.weights import LocatedWeights, published_weights

# Increase when the tiny model's random weights change.
TINY_VERSION = 1


def model_weights(config: RunConfig, root: Path) -> LocatedWeights:
    """Locate the weights of the config's model, present or not; reads only.

    The headers of the files that are present are checked: at the start of a run, in a dry run, and
    again when files were fetched.

    Raises:
        UserError: a file is damaged or the wrong one.
    """
    if config.model.source == "random":
        return _tiny(config, root)
    located = published_weights(config, root, whole=False)
    local = {file.part for file in located.local}  # checked already
    for part, path in asdict(located.paths).items():
        if part in local or not path or not Path(path).is_file():
            continue
        try:
            check_file(part, Path(path))
        except DamagedFileError as error:
            # The weights stage verifies what was not yet, and fetches a damaged file again.
            if located.checked or "weights" in config.stages.skip:
                raise UserError(
                    f"{error} (model.{part}): stages.force=[weights] fetches it again."
                ) from None
    return located


def _tiny(config: RunConfig, root: Path) -> LocatedWeights:
    folder = root / "cache" / "weights" / f"tiny-{TINY_VERSION}"
    transformer = f"transformer/{config.task.name}"
    paths = WeightPaths(
        transformer=str(folder / transformer / "diffusion_pytorch_model.safetensors"),
        vae=str(folder / "vae"),
        text_encoder=str(folder / "text_encoder"),
        byt5=str(folder / "byt5"),
        image_encoder=str(folder / "image_encoder"),
    )
    digests: dict[str, str] | None = None
    if all((folder / part).is_file() for part in PARTS):
        digests = {
            "transformer": _digest(folder / transformer),
            **{
                part: _digest(folder / part)
                for part in ("vae", "text_encoder", "byt5", "image_encoder")
            },
        }
    command = module_command(sys.executable, checkout(), "make_weights", "--output", str(folder))
    tokenizer = folder / "text_encoder" / "tokenizer"
    return LocatedWeights(
        paths,
        digests,
        (command,),
        "random weights of the tiny model",
        tokenizer if tokenizer.is_dir() else None,
    )


def _digest(folder: Path) -> str:
    """Digest all files of a folder; the tiny model's are small enough to read each time."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(folder).as_posix()}\0".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
