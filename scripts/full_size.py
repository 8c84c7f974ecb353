"""What both sides of check-full-size share: settings, cases, and what is recorded.

It runs in this project's Python and in musubi-tuner's (3.10 or newer).
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import check_common as common
import torch
from check_common import FULL, TINY, Shape
from check_engines import Engine
from torch import Tensor, nn

# One commit for every repository of the stand-in for the Hugging Face cache.
COMMIT = "0" * 40
PLACES = {
    "transformer": ("tencent/HunyuanVideo-1.5", "transformer/720p_t2v"
                    "/diffusion_pytorch_model.safetensors"),
    "vae": ("tencent/HunyuanVideo-1.5", "vae/diffusion_pytorch_model.safetensors"),
    "text_encoder": ("Comfy-Org/HunyuanVideo_1.5_repackaged",
                     "split_files/text_encoders/qwen_2.5_vl_7b.safetensors"),
    "byt5": ("Comfy-Org/HunyuanVideo_1.5_repackaged",
             "split_files/text_encoders/byt5_small_glyphxl_fp16.safetensors"),
    "image_encoder": ("Comfy-Org/HunyuanVideo_1.5_repackaged",
                      "split_files/clip_vision/sigclip_vision_patch14_384.safetensors"),
}  # fmt: skip

# The cases of the transformer: task and shape.
CASES = {
    "image": ("t2v", "1x34x60+87+0"),
    "clip": ("t2v", "7x34x60+64+23"),
    "i2v": ("i2v", "7x34x60+71+11"),
    "two": ("t2v", "1x34x60+87+20x2"),
}
TINY_CASES = {
    "image": ("t2v", "1x4x6+9+0"),
    "clip": ("t2v", "2x4x6+9+3"),
    "i2v": ("i2v", "2x4x6+8+2"),
    "two": ("t2v", "1x4x6+16+3x2"),
}
# Cases whose outputs and gradients are compared in float32 too, and not as a reference alone.
EXACT = ("image", "two")
STEPS = 20

CAPTIONS = [
    "a photo of a cat",
    "A rocket rises from the launch pad; " * 6,
    "stars",
    "The camera pans to the left over a wooden table with a cup of coffee. " * 15,
]
QUOTES = ['a sign that says "OPEN"', 'two signs, "left" and "right turn only", at night',
          'a page: "' + "every word of a long text " * 8 + '"']  # fmt: skip

# The tiny networks: options of musubi-tuner's classes; the runner's get the same.
TINY_SIZES: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": (8, 16, 32, 64, 64), "layers_per_block": 1},
    "byt5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
             "num_decoder_layers": 1},
    "image_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "image_size": 56, "patch_size": 14},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640},
}  # fmt: skip
TINY_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Settings:
    """Where the weights and the results lie, and what is computed."""

    folder: str
    device: str
    tiny: bool
    cases: tuple[str, ...]
    steps: int

    def write(self, path: Path) -> None:
        """Write the settings for the processes of both sides."""
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read what :meth:`write` wrote."""
        values = json.loads(path.read_text("utf-8"))
        return cls(**{**values, "cases": tuple(values["cases"])})

    @property
    def transformer_sizes(self) -> common.Sizes:
        """The transformer's sizes."""
        return TINY if self.tiny else FULL

    def file(self, part: str) -> Path:
        """Return where a part's weights lie: in the layout of the Hugging Face cache."""
        repository, name = PLACES[part]
        return repository_folder(Path(self.folder), repository) / name

    def result(self, name: str) -> Path:
        """Return the file of one result."""
        return Path(self.folder) / "results" / f"{name}.safetensors"

    def empty(self) -> Path:
        """Return a file without tensors."""
        path = Path(self.folder) / "empty.safetensors"
        save(path, {})
        return path

    def sizes(self, part: str) -> dict[str, Any]:
        """Return the options of musubi-tuner's class that differ from the published ones."""
        if not self.tiny:
            return {}
        if part != "qwen":
            return TINY_SIZES[part]
        small = TINY_SIZES["text_encoder"]
        rope = {"rope_scaling": {**TINY_ROPE, "type": "default"}, "max_window_layers": 4}
        layers = {"layer_types": ["full_attention"] * small["num_hidden_layers"]}
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
                  "out_hidden_size": 64, "fullatt_block_indexes": [0]}  # fmt: skip
        return {**small, **rope, "text_config": {**small, **rope, **layers},
                "vision_config": vision}  # fmt: skip

    def case(self, name: str) -> tuple[str, Shape]:
        """Return a case's task and shape."""
        task, shape = (TINY_CASES if self.tiny else CASES)[name]
        return task, Shape.parse(shape)

    def vae_cases(self) -> dict[str, tuple[Any, int]]:
        """Return frames [F, H, W, 3] uint8 and the side of a tile (0: none) for each case."""
        sides = {"clip": (5, 32, 48), "image": (1, 48, 64)} if self.tiny else {
            "clip": (25, 256, 320), "image": (1, 544, 960)}  # fmt: skip
        result = {}
        for name, shape in sides.items():
            for tile in (0,) if self.tiny else (0, 128):
                pixels = common.normal(f"vae/{name}", *shape, 3).mul(64).add(128).clamp(0, 255)
                case = name if tile == 0 else f"{name}, tiles of {tile}"
                result[case] = pixels.to(torch.uint8).numpy(), tile
        return result

    def picture(self) -> Any:
        """Return SigLIP's picture [H, W, 3] uint8."""
        pixels = common.normal("vision/picture", 90, 160, 3).mul(64).add(128).clamp(0, 255)
        return pixels.to(torch.uint8).numpy()


def repository_folder(folder: Path, repository: str) -> Path:
    """Return the snapshot of a repository in the folder's Hugging Face cache."""
    name = f"models--{repository.replace('/', '--')}"
    return folder / "hf" / "hub" / name / "snapshots" / COMMIT


def merged(options: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace options, those of nested groups one by one."""
    result = dict(options)
    for name, value in sizes.items():
        old = result.get(name)
        nested = isinstance(value, dict) and isinstance(old, dict) and name.endswith("_config")
        result[name] = {**old, **value} if nested and isinstance(old, dict) else value
    return result


def precisions(settings: Settings, cases: tuple[str, ...]) -> list[str]:
    """Return bf16, and float32 after it if a case needs it."""
    return ["bf16", "fp32"] if cases else ["bf16"]


def record_dit(
    side: str, settings: Settings, precision: str, make: Callable[[str], Engine]
) -> None:
    """Record loss, outputs with and without LoRA, and gradients of every case.

    The runner's float32 is needed in some cases only; musubi-tuner's is everybody's reference.
    """
    for name in settings.cases:
        if precision == "fp32" and side == "ours" and name not in EXACT:
            continue
        task, shape = settings.case(name)
        engine = make(task)
        common.fill_lora(engine.network.named_parameters(), seed=0)
        inputs = common.draw_inputs(0, task, shape, settings.transformer_sizes)
        loss, prediction, gradients = engine.gradients(inputs)
        with torch.no_grad():
            for parameter_name, parameter in engine.network.named_parameters():
                if "lora_up" in parameter_name:
                    parameter.zero_()
            _, without = engine.forward(inputs)
        tensors = {f"gradient/{key}": value for key, value in gradients.items()
                   if value is not None}  # fmt: skip
        tensors |= {"loss": torch.tensor(loss), "output": prediction, "without": without}
        save(settings.result(f"{side}-dit-{name}-{precision}"), tensors)
        print(f"{side} {name} {precision}: loss {loss:.6f}", flush=True)


def record_steps(side: str, settings: Settings, engine: Engine) -> None:
    """Record losses and gradient norms of training steps from a fresh LoRA.

    Every fifth step is a clip, the others are images; AdamW, 1e-4, clipping at 1.0.
    """
    common.fill_lora(engine.network.named_parameters(), seed=1)
    with torch.no_grad():
        for name, parameter in engine.network.named_parameters():
            if "lora_up" in name:
                parameter.zero_()
    optimizer = torch.optim.AdamW(engine.network.parameters(), lr=1e-4, fused=False, foreach=True)
    losses, norms, seconds = [], [], []
    for step in range(settings.steps):
        task, shape = settings.case("clip" if step % 5 == 4 else "image")
        inputs = common.draw_inputs(1000 + step, task, shape, settings.transformer_sizes)
        begun = time.monotonic()
        optimizer.zero_grad(set_to_none=True)
        loss, _ = engine.forward(inputs)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(engine.network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
        seconds.append(time.monotonic() - begun)
    engine.network.zero_grad(set_to_none=True)
    tensors = {"losses": losses, "norms": norms, "seconds": seconds}
    save(settings.result(f"{side}-steps"), {
        name: torch.tensor(values, dtype=torch.float64) for name, values in tensors.items()
    })  # fmt: skip
    print(f"{side} steps: losses {losses[0]:.6f} to {losses[-1]:.6f}", flush=True)


def record_loss(name: str, settings: Settings, engine: Engine) -> None:
    """Record the loss of the first case with the LoRA that the engine has now."""
    task, shape = settings.case("image")
    inputs = common.draw_inputs(7, task, shape, settings.transformer_sizes)
    with torch.no_grad():
        loss, _ = engine.forward(inputs)
    save(settings.result(name), {"loss": loss.double()})
    print(f"{name}: loss {float(loss):.6f}", flush=True)


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def free() -> None:
    """Give memory back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
