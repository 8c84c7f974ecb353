"""What check-compile and check-full-size share: sizes, random numbers, one training step.

It runs in this project's Python and in musubi-tuner's (3.10 or newer), and imports the runner only
where the engine is the runner's own.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOP = Path(__file__).resolve().parent.parent
RANK, ALPHA = 32, 16.0
LATENT_CHANNELS = 32


@dataclass(frozen=True)
class Sizes:
    """The transformer's width, heads, depth and rotary axes, and those of its inputs."""

    hidden: int
    heads: int
    depth: int
    rope: tuple[int, int, int]
    text: int
    byt5: int
    vision: int
    vision_tokens: int


FULL = Sizes(2048, 16, 54, (16, 56, 56), 3584, 1472, 1152, 729)
TINY = Sizes(64, 4, 2, (4, 6, 6), 64, 32, 32, 5)


@dataclass(frozen=True)
class Shape:
    """A batch: latent frames, height, width; the first item's text and ByT5 tokens; the items."""

    frames: int
    height: int
    width: int
    text: int
    byt5: int
    items: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``7x34x60+64+23`` or, for two items, ``7x34x60+64+23x2``."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)\+(\d+)\+(\d+)(?:x(\d+))?", text)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no shape; write FRAMESxHEIGHTxWIDTH+TEXT+BYT5 in tokens, with xITEMS "
                "for more than one item, such as 7x34x60+64+23x2"
            )
        frames, height, width, words, glyphs, items = (int(part or 1) for part in match.groups())
        return cls(frames, height, width, words, glyphs, items)

    def __str__(self) -> str:
        end = f"x{self.items}" if self.items > 1 else ""
        return f"{self.frames}x{self.height}x{self.width}+{self.text}+{self.byt5}{end}"


@dataclass(frozen=True)
class Inputs:
    """The inputs of one training step, as the caches give them; fp32 on the CPU.

    Attributes:
        latents: [B, 32, F, h, w], unscaled.
        noise: of the same shape.
        times: [B], in 0..1.
        text: of each item, [L, text width].
        byt5: of each item, [L2, ByT5 width].
        condition: i2v only, [B, 33, F, h, w], unscaled, with the mask as last channel.
        vision: i2v only, [B, N, vision width].
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    text: list[Tensor]
    byt5: list[Tensor]
    condition: Tensor | None
    vision: Tensor | None


def normal(name: str, *shape: int, device: str = "cpu") -> Tensor:
    """Draw standard normal float32 values that depend on name, shape and kind of device alone."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device)


def draw_inputs(seed: int, task: str, shape: Shape, sizes: Sizes) -> Inputs:
    """Draw a step's inputs; each further item has 11 text tokens fewer than the one before."""
    name = f"{seed}/{task}/{shape}"
    grid = (shape.frames, shape.height, shape.width)
    latents = (shape.items, LATENT_CHANNELS, *grid)
    condition = vision = None
    if task == "i2v":
        condition = torch.zeros(shape.items, LATENT_CHANNELS + 1, *grid)
        first = normal(f"{name}/first", shape.items, LATENT_CHANNELS, 1, *grid[1:])
        condition[:, :LATENT_CHANNELS, :1] = first
        condition[:, LATENT_CHANNELS, 0] = 1
        vision = normal(f"{name}/vision", shape.items, sizes.vision_tokens, sizes.vision)
    words = [max(1, shape.text - 11 * item) for item in range(shape.items)]
    return Inputs(
        latents=normal(f"{name}/latents", *latents),
        noise=normal(f"{name}/noise", *latents),
        times=torch.sigmoid(normal(f"{name}/times", shape.items)),
        text=[normal(f"{name}/text{i}", count, sizes.text) for i, count in enumerate(words)],
        byt5=[normal(f"{name}/byt5{i}", shape.byt5, sizes.byt5) for i in range(shape.items)],
        condition=condition,
        vision=vision,
    )


def weight(name: str, shape: tuple[int, ...], device: str, deviation: float = 1.0) -> Tensor:
    """Draw a tensor of a published file: activations stay moderate.

    Args:
        name: the tensor's name, from which it is drawn.
        shape: its shape.
        device: where to draw it.
        deviation: that of a matrix with one input; it is divided by the root of the inputs.
    """
    values = normal(name, *shape, device=device)
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        return values.mul_(0.1).add_(1)
    if len(shape) > 1:
        return values.mul_(deviation / math.sqrt(math.prod(shape[1:])))
    return values.mul_(0.1)


@torch.no_grad()
def fill(named: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Fill frozen weights in place with values that bf16 holds exactly."""
    for name, tensor in named:
        values = weight(f"{seed}/{name}", tuple(tensor.shape), tensor.device.type)
        tensor.copy_(values.bfloat16())


@torch.no_grad()
def fill_lora(named: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Fill a LoRA in place; lora_up is not zero, as it is not after some training."""
    for name, tensor in named:
        size = 0.2 if "lora_up" in name else 1.0
        values = normal(f"{seed}/{name}", *tensor.shape, device=tensor.device.type)
        tensor.copy_(values * (size / math.sqrt(tensor.shape[1])))


Gradients = dict[str, "Tensor | None"]


def errors(found: Mapping[str, Tensor | None], reference: Gradients) -> dict[str, float]:
    """Compare gradients with the reference: ||g - ref|| / ||ref|| for each tensor.

    A tensor without gradient in the reference, or with a zero one, must be so here too; it is left
    out if it is and infinitely wrong if it is not. NaN is infinitely wrong.
    """
    result = {}
    for name, right in reference.items():
        value = found[name]
        size = 0.0 if right is None else float(right.float().norm())
        if right is None or size == 0:
            if value is not None and float(value.norm()) != 0:
                result[name] = math.inf
            continue
        got = torch.zeros_like(right) if value is None else value
        error = float((got.float() - right.float()).norm()) / size
        result[name] = error if math.isfinite(error) else math.inf
    return result


def median(values: Iterable[float]) -> float:
    """Return the upper median."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Format rows as a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(packages: tuple[str, ...]) -> str:
    """Name the GPU, and the versions of PyTorch and of packages."""
    import importlib.metadata as metadata

    gpu = "CPU"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        gpu = f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)"
    versions = [f"PyTorch {torch.__version__}", f"Python {sys.version.split()[0]}"]
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    if torch.backends.cudnn.is_available():
        versions.append(f"cuDNN {torch.backends.cudnn.version()}")
    return ", ".join([gpu, *versions])


def quiet(call: Callable[[], Any]) -> Any:
    """Make a call without what it prints."""
    with contextlib.redirect_stdout(None):
        return call()


def shrunk(package: Path, into: Path, sizes: Sizes) -> None:
    """Copy musubi-tuner's package to a folder, with other constants for its transformer.

    Raises:
        SystemExit: a constant is not there once, so this is not v0.3.4.
    """
    import shutil

    copy = into / "musubi_tuner"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / "hunyuan_video_1_5" / "hunyuan_video_1_5_models.py"
    text = file.read_text("utf-8")
    edits = {
        r"(self\.rope_dim_list = )\[[^\]]*\]": str(list(sizes.rope)),
        r"(self\.vision_states_dim = )\d+": str(sizes.vision),
        r"(self\.hidden_size = )\d+": str(sizes.hidden),
        r"(self\.heads_num = )\d+": str(sizes.heads),
        r"(mm_double_blocks_depth = )\d+": str(sizes.depth),
        r"(text_states_dim = )\d+": str(sizes.text),
        r"(ByT5Mapper\(in_dim=)\d+": str(sizes.byt5),
    }
    for pattern, value in edits.items():
        text, count = re.subn(pattern, lambda m, v=value: m[1] + v, text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{file.name}: {pattern} is there {count} times; is this v0.3.4?")
    file.write_text(text, "utf-8")
