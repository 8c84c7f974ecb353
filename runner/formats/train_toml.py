"""The texts of the trainer's files: train.toml and the prompts of the previews; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.schema import RunConfig


@dataclass(frozen=True)
class WeightPaths:
    """The files that the trainer loads; folders for the tiny model."""

    transformer: str
    vae: str
    text_encoder: str
    byt5: str
    image_encoder: str


def render(options: Mapping[str, Any]) -> str:
    """Render the options as TOML."""
    import tomli_w

    return tomli_w.dumps(dict(options))


def sample_prompts(config: RunConfig, image: str | None) -> str:
    """Render the prompts of the previews in musubi-tuner's form, one line per prompt."""
    sampling = config.sampling
    tail = (
        f" --w {sampling.width} --h {sampling.height} --f {sampling.frames}"
        f" --d {sampling.seed} --s {sampling.steps} --l {sampling.guidance_scale:g}"
        f" --fs {sampling.flow_shift:g}"
    )
    if sampling.negative_prompt:
        tail += f" --n {sampling.negative_prompt}"
    if image is not None:
        tail += f" --i {image}"
    return "".join(f"{prompt}{tail}\n" for prompt in sampling.prompts)
