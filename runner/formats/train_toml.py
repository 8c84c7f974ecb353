"""The trainer's files: train.toml's text, and the previews' prompts; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.schema import RunConfig


@dataclass(frozen=True)
class WeightPaths:
    """Files, or for the tiny model folders, that the trainer loads."""

    transformer: str
    vae: str
    text_encoder: str
    byt5: str
    image_encoder: str


def render(options: Mapping[str, Any]) -> str:
    """The options as TOML text."""
    import tomli_w

    return tomli_w.dumps(dict(options))


def sample_prompts(config: RunConfig, image: str | None) -> str:
    """The previews' prompts in musubi-tuner's one-line-a-prompt form."""
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
