"""Previews while training: pictures and clips that the current network makes from prompts.

The prompt file has musubi-tuner's form, one prompt per line with options after it:

    a red kite --w 96 --h 64 --f 9 --d 1 --s 20 --l 6 --fs 7 --n blurry --i first_frame.png

w and h in pixels (multiples of 16), f in frames (4k + 1), d seed, s steps, l (or g) guidance
scale, fs timestep shift, n negative prompt, i first frame (i2v). Lines that begin with # are
ignored. Sampling is Euler's method on the flow, with the timesteps of musubi-tuner's and diffusers'
pipelines; previews go to <output_dir>/sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runner.config.latent_frames import latent_frames, valid_frames
from runner.core.atomic import whole
from runner.core.errors import UserError
from runner.engines.diffusers import flow, models, placement, text_encoding
from runner.formats.captions import MAX_TOKENS
from runner.formats.frames import MODEL_FPS
from runner.formats.train_options import TrainOptions

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One preview, with musubi-tuner's defaults; with a guidance of 1 ``negative`` is unused."""

    text: str
    width: int = 256
    height: int = 256
    frames: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 6.0
    shift: float = 14.5
    negative: str = ""
    image: str | None = None


_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", int),
    "h": ("height", int),
    "f": ("frames", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "g": ("guidance", float),
    "l": ("guidance", float),
    "fs": ("shift", float),
    "n": ("negative", str),
    "i": ("image", str),
}


def parse_prompts(text: str) -> list[Prompt]:
    """Parse the text of a prompt file, rounding sizes down to those that the network supports.

    Raises:
        UserError: an option is unknown, a value cannot be parsed, a size is below 16 pixels, or
            there is no prompt.
    """
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        first, *options = re.split(r"\s+--(?=\w)", line.strip())
        values: dict[str, Any] = {}
        for option in options:
            key, _, value = option.partition(" ")
            name, read = _READERS.get(key.lower(), ("", str))
            try:
                if not name:
                    raise ValueError
                values[name] = read(value.strip())
            except ValueError:
                known = " ".join(f"--{name}" for name in _READERS)
                raise UserError(
                    f"sample_prompts, line {number}: '--{option}' cannot be read; known: {known}"
                ) from None
        prompt = Prompt(first, **values)
        if min(prompt.width, prompt.height) < 16 or prompt.frames < 1 or prompt.steps < 1:
            raise UserError(f"sample_prompts, line {number}: sizes under 16, no frames or no steps")
        prompts.append(
            replace(
                prompt,
                width=prompt.width // 16 * 16,
                height=prompt.height // 16 * 16,
                frames=valid_frames(prompt.frames),
            )
        )
    if not prompts:
        raise UserError("sample_prompts: the file holds no prompt")
    return prompts


def euler(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, *, steps: int, shift: float
) -> Tensor:
    """Integrate a flow from noise at time 1 to time 0 by Euler's method.

    Args:
        velocity: function of (latents, time); returns a tensor shaped like ``noise``.
        noise: the latents at time 1.
        steps: number of steps.
        shift: the timestep shift.

    Returns:
        The latents at time 0.
    """
    latents = noise
    times = flow.shift_time(torch.linspace(1, 0, steps + 1), shift).tolist()
    for now, then in pairwise(times):
        latents = latents - (now - then) * velocity(latents, now)
    return latents


@dataclass(frozen=True)
class Conditions:
    """Encoded conditions of one prompt, as batches of one; ``negative`` only with guidance."""

    prompt: Prompt
    positive: flow.Batch
    negative: flow.Batch | None


def previewer(
    options: TrainOptions, device: str, memory_limit_gb: float | None = None
) -> Previewer | None:
    """Make a Previewer for the run; None if it has no prompts.

    Args:
        options: the options of train.toml.
        device: torch's name of the device.
        memory_limit_gb: GPU memory to encode the prompts in, in GiB; by default all that is free.

    Raises:
        UserError: the prompt file, a model or a first frame is missing or cannot be read.
    """
    if options.sample_prompts is None:
        return None
    if options.sample_every_n_epochs is None and not options.sample_at_first:
        return None
    try:
        prompts = parse_prompts(Path(options.sample_prompts).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{options.sample_prompts}: cannot be read ({error.strerror})") from None
    needed = ["vae", "text_encoder", "byt5"] + (["image_encoder"] if options.task == "i2v" else [])
    for key in needed:
        if getattr(options, key) is None:
            raise UserError(f"train.toml: {key} is missing; previews need it")
    return Previewer(options, prompts, device, memory_limit_gb)


class Previewer:
    """The previews of one run; text and first frames are encoded once, at the start."""

    def __init__(
        self,
        options: TrainOptions,
        prompts: Sequence[Prompt],
        device: str,
        memory_limit_gb: float | None,
    ) -> None:
        self._folder = Path(options.output_dir) / "sample"
        self._name = options.output_name
        self._device = device
        self._unscaled = options.i2v_unscaled_condition
        self._vae: Any = models.load_vae(str(options.vae))
        self._conditions = self._encode(options, prompts, memory_limit_gb)

    @torch.no_grad()
    def sample(self, forward: nn.Module, *, epoch: int) -> list[Path]:
        """Make every preview.

        Returns:
            The files: PNG for one frame, MP4 for more.
        """
        files = []
        for index, conditions in enumerate(self._conditions):
            latents = self.latents(forward, conditions)
            frames = self._decode(latents)
            seed = conditions.prompt.seed
            stem = self._folder / f"{self._name}_e{epoch:06d}_{index:02d}_{seed}"
            files.append(save_frames(stem, frames))
            print(f"preview {files[-1]}", flush=True)
        return files

    def latents(self, forward: nn.Module, conditions: Conditions) -> Tensor:
        """Sample scaled latents [1, 32, F, h, w] from noise."""
        prompt = conditions.prompt
        shape = conditions.positive.latents.shape
        generator = torch.Generator().manual_seed(prompt.seed)
        noise = torch.randn(shape, generator=generator).to(self._device)

        def velocity(latents: Tensor, time: float) -> Tensor:
            wanted = self._velocity(forward, latents, time, conditions.positive)
            if conditions.negative is None:
                return wanted
            plain = self._velocity(forward, latents, time, conditions.negative)
            return plain + prompt.guidance * (wanted - plain)

        return euler(velocity, noise, steps=prompt.steps, shift=prompt.shift)

    def _velocity(
        self, forward: nn.Module, latents: Tensor, time: float, batch: flow.Batch
    ) -> Tensor:
        batch = batch.to(self._device)
        hidden = flow.model_input(latents, batch, scale_condition=not self._unscaled)
        timestep = latents.new_full((1,), 1000 * time)
        return forward(hidden, timestep, batch).float()

    def _decode(self, latents: Tensor) -> np.ndarray:
        vae = self._vae.to(self._device)
        with torch.autocast(self._device, enabled=False):
            scaled = (latents / flow.VAE_SCALING_FACTOR).to(vae.dtype)
            video = vae.decode(scaled, return_dict=False)[0]
        if self._device != "cpu":
            vae.to("cpu")
        pixels = (video[0].float().clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

    @torch.no_grad()
    def _encode(
        self, options: TrainOptions, prompts: Sequence[Prompt], memory_limit_gb: float | None
    ) -> list[Conditions]:
        first_frames = self._first_frames(options, prompts)
        tokenizer, encoder = placement.load_text_encoder(
            Path(str(options.text_encoder)),
            self._device,
            tokens=MAX_TOKENS,
            limit_gb=memory_limit_gb,
        )
        byt5_tokenizer, byt5 = models.load_byt5(str(options.byt5), device=self._device)
        known: dict[str, tuple[Tensor, Tensor]] = {}

        def batch(text: str, prompt: Prompt, first: tuple[Tensor, Tensor] | None) -> flow.Batch:
            if text not in known:
                pair = text_encoding.encode_prompt(tokenizer, encoder, byt5_tokenizer, byt5, text)
                known[text] = (pair[0].cpu(), pair[1].cpu())
            frames = latent_frames(prompt.frames)
            latents = torch.zeros(32, frames, prompt.height // 16, prompt.width // 16)
            condition = vision = None
            if first is not None:
                # As in the cache files: latent of the first frame, then zeros; mask last.
                condition = torch.cat([latents, torch.zeros_like(latents[:1])])
                condition[:-1, :1], condition[-1, 0] = first[0], 1
                vision = first[1]
            return flow.collate([flow.TrainingExample(latents, *known[text], condition, vision)])

        result = []
        for prompt, first in zip(prompts, first_frames, strict=True):
            negative = None
            if prompt.guidance != 1:
                negative = batch(prompt.negative, prompt, first)
            result.append(Conditions(prompt, batch(prompt.text, prompt, first), negative))
        return result

    def _first_frames(
        self, options: TrainOptions, prompts: Sequence[Prompt]
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Encode first frames: unscaled latent [32, 1, h, w] and image embeddings per prompt."""
        if options.task != "i2v":
            return [None] * len(prompts)
        from runner.data.decode import load_image, resize_to_bucket
        from runner.engines.diffusers.cache_latents import encode_frames, image_features

        processor, encoder = models.load_image_encoder(
            str(options.image_encoder), device=self._device
        )
        vae = self._vae.to(self._device)
        result: list[tuple[Tensor, Tensor] | None] = []
        for prompt in prompts:
            if prompt.image is None:
                raise UserError("sample_prompts: an i2v preview needs a first frame (--i IMAGE)")
            image = resize_to_bucket(load_image(prompt.image), (prompt.width, prompt.height))
            latent = encode_frames(vae, image[None].copy())
            vision = image_features(processor, encoder, image)
            result.append((latent.float().cpu(), vision.cpu()))
        return result


def save_frames(stem: Path, frames: np.ndarray) -> Path:
    """Write frames [F, H, W, 3] uint8 atomically to ``stem``.png (one frame) or ``stem``.mp4."""
    path = stem.with_name(stem.name + (".png" if len(frames) == 1 else ".mp4"))
    with whole(path, keep_suffix=True) as temporary:
        if len(frames) == 1:
            from PIL import Image

            Image.fromarray(frames[0]).save(temporary)
        else:
            _write_mp4(temporary, frames)
    return path


def _write_mp4(path: Path, frames: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(int(MODEL_FPS)))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
