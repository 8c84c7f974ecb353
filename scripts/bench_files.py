"""The files that the bench trains on: random weights, a LoRA, caches, dataset.toml, train.toml.

bench_files.py FILES.json cpu|cuda [WORK ...] [part:PART ...]
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_common as common
import torch
from check_common import ALPHA, FULL, RANK, TINY, Sizes

sys.path.insert(0, str(common.TOP))

SEED = 42
# The step whose gradients are compared. The first ones compile, capture graphs and fill buffers.
CHECKED_STEP = 3
TEXT, BYT5 = 64, 23
# The tiny model's caption fits into one multiple of 64 tokens too.
TINY_TEXT, TINY_BYT5 = 9, 2


@dataclass(frozen=True)
class Work:
    """What a row trains on: one cached item, repeated.

    Attributes:
        task: ``t2v`` or ``i2v``.
        frames: of the clip, in pixels; None for an image.
        width, height: in pixels.
    """

    task: str
    frames: int | None
    width: int
    height: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        return ((self.frames or 1) - 1) // 4 + 1, self.height // 16, self.width // 16


WORKS = {
    "image": Work("t2v", None, 960, 544),
    "clip": Work("t2v", 25, 960, 544),
    "i2v": Work("i2v", 25, 960, 544),
    "large": Work("t2v", 61, 1280, 720),
}
TINY_WORKS = {
    "image": Work("t2v", None, 96, 64),
    "clip": Work("t2v", 5, 96, 64),
    "i2v": Work("i2v", 5, 96, 64),
    "large": Work("t2v", 9, 96, 64),
}


@dataclass(frozen=True)
class Files:
    """The folder in which everything lies.

    Attributes:
        folder: absolute.
        tiny: whether the sizes are the tiny model's, for a test on the CPU.
    """

    folder: Path
    tiny: bool

    @property
    def sizes(self) -> Sizes:
        """The transformer's sizes."""
        return TINY if self.tiny else FULL

    @property
    def works(self) -> dict[str, Work]:
        """What can be trained on."""
        return TINY_WORKS if self.tiny else WORKS

    @property
    def transformer(self) -> Path:
        """The transformer's weights."""
        if self.tiny:
            folder = self.folder / "tiny" / "transformer" / "t2v"
            return folder / "diffusion_pytorch_model.safetensors"
        return self.weights("transformer")

    @property
    def lora(self) -> Path:
        """The LoRA that every row starts from; lora_up is not zero."""
        return self.folder / "lora.safetensors"

    def weights(self, part: str) -> Path:
        """Return where a part's published weights lie."""
        return self.folder / f"{part}.safetensors"

    def cache(self, work: str) -> Path:
        """Return the cache folder of a work."""
        return self.folder / "caches" / work

    def inputs(self, work: str) -> Path:
        """Return the file with noise and timestep of a work's checked step."""
        return self.folder / "inputs" / f"{work}.safetensors"

    def gradients(self, work: str) -> Path:
        """Return the file of a work's float32 gradients."""
        return self.folder / "gradients" / f"{work}.safetensors"

    def write_transformer(self, device: str) -> None:
        """Write the transformer's weights, and the LoRA's, once."""
        if self.tiny:
            from runner.engines.diffusers.make_weights import make_weights

            make_weights(self.folder / "tiny")
        else:
            self.write_part("transformer", device)
        if not self.lora.is_file():
            self._write_lora()

    def write_part(self, part: str, device: str) -> None:
        """Write the weights of one part in the published layout, once."""
        from safetensors.torch import save_file

        from runner.formats.published_layout import layout

        path = self.weights(part)
        if path.is_file():
            return
        dtype = torch.bfloat16 if part in ("transformer", "text_encoder") else torch.float16
        deviation = 0.5 if part == "transformer" else 1.0
        tensors = {}
        for name, shape in layout(part, whole=True).items():
            values = common.weight(f"{part}/{name}", shape, device, deviation)
            tensors[name] = values.to(dtype).cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".part"), {"format": "pt"})
        path.with_suffix(".part").replace(path)

    def _write_lora(self) -> None:
        from safetensors.torch import save_file

        from runner.formats.lora import lora_name
        from runner.formats.transformer_keys import BLOCK_LINEARS

        width = self.sizes.hidden
        tensors: dict[str, torch.Tensor] = {}
        for block in range(self.sizes.depth):
            for module in BLOCK_LINEARS:
                inputs = 4 * width if module.endswith("fc2") else width
                wider = {"mod.linear": 6, "mlp.fc1": 4}
                outputs = width * next((n for end, n in wider.items() if module.endswith(end)), 1)
                name = lora_name(f"double_blocks.{block}.{module}")
                down = common.normal(f"{name}/down", RANK, inputs) / math.sqrt(inputs)
                up = common.normal(f"{name}/up", outputs, RANK) * (0.2 / math.sqrt(RANK))
                tensors |= {
                    f"{name}.lora_down.weight": down,
                    f"{name}.lora_up.weight": up,
                    f"{name}.alpha": torch.tensor(ALPHA),
                }
        save_file(tensors, self.lora)

    def write_work(self, name: str) -> None:
        """Write a work's cached item, and noise and timestep of its checked step."""
        from runner.engines.diffusers import flow
        from runner.formats import cache_files
        from runner.formats.frames import Crop

        work, sizes, folder = self.works[name], self.sizes, self.cache(name)
        if self.inputs(name).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "media").mkdir(exist_ok=True)
        grid = work.grid
        latents = common.normal(f"{name}/latents", 32, *grid)
        condition = vision = None
        if work.task == "i2v":
            condition = torch.zeros(33, *grid)
            condition[:32, :1] = common.normal(f"{name}/first", 32, 1, *grid[1:])
            condition[32, 0] = 1
            vision = common.normal(f"{name}/vision", sizes.vision_tokens, sizes.vision).half()
        size = (work.width, work.height)
        file = cache_files.image_latents_name("item", size)
        if work.frames is not None:
            file = cache_files.video_latents_name("item", Crop(0, work.frames), size)
        cache_files.write_latents(
            folder / file, latents.half() if condition is None else latents, size=size,
            frame_count=work.frames, latents_image=condition, siglip=vision,
        )  # fmt: skip
        words, glyphs = (TINY_TEXT, TINY_BYT5) if self.tiny else (TEXT, BYT5)
        cache_files.write_text(
            folder / cache_files.text_name("item"),
            common.normal(f"{name}/text", words, sizes.text).bfloat16(),
            common.normal(f"{name}/byt5", glyphs, sizes.byt5).half(),
            caption="a caption",
        )
        # As the embedded engine draws them.
        noise = torch.Generator().manual_seed(flow.derived_seed(SEED, "noise"))
        times = torch.Generator().manual_seed(flow.derived_seed(SEED, "times"))
        for _ in range(CHECKED_STEP):
            drawn = {
                "noise": torch.randn((1, 32, *grid), generator=noise),
                "times": flow.TimeSampling().draw(1, times),
            }
        from safetensors.torch import save_file

        self.inputs(name).parent.mkdir(parents=True, exist_ok=True)
        save_file(drawn, self.inputs(name))

    def read_inputs(self, name: str) -> common.Inputs:
        """Return a work's checked step, as check_engines takes it.

        It needs nothing but torch and safetensors: musubi-tuner's Python reads it too.
        """
        from safetensors.torch import load_file

        found: dict[str, torch.Tensor] = {}
        for file in sorted(self.cache(name).glob("*.safetensors")):
            for key, value in load_file(file).items():
                start = "latents_image" if key.startswith("latents_image") else key.split("_")[0]
                found["byt5" if "byt5" in key else start] = value.float()
        drawn = load_file(self.inputs(name))
        condition, vision = found.get("latents_image"), found.get("siglip")
        return common.Inputs(
            latents=found["latents"][None],
            noise=drawn["noise"],
            times=drawn["times"],
            text=[found["varlen"]],
            byt5=[found["byt5"]],
            condition=None if condition is None else condition[None],
            vision=None if vision is None else vision[None],
        )

    def write_run(
        self, run: Path, works: tuple[str, ...], steps: int, options: dict[str, Any]
    ) -> None:
        """Write dataset.toml and train.toml of a row into its folder.

        Args:
            run: the folder.
            works: what it trains on.
            steps: the number of steps.
            options: options of train.toml besides or instead of the usual ones.
        """
        import tomli_w

        usual: dict[str, Any] = {
            "task": self.works[works[0]].task,
            "dit": str(self.transformer),
            "dataset_config": "dataset.toml",
            "sdpa": True,
            "mixed_precision": "no" if self.tiny else "bf16",
            "timestep_sampling": "shift",
            "discrete_flow_shift": 1.0,
            "weighting_scheme": "none",
            "optimizer_type": "AdamW",
            # So small that the checked step has the weights that the first one had.
            "learning_rate": 1e-8,
            "max_grad_norm": 1.0,
            "network_module": "networks.lora_hv_1_5",
            "network_dim": RANK,
            "network_alpha": ALPHA,
            "network_weights": str(self.lora),
            "max_data_loader_n_workers": 2,
            "persistent_data_loader_workers": True,
            "seed": SEED,
            "output_dir": "checkpoints",
            "output_name": "lora",
            "save_precision": "bf16",
            "logging_dir": "tensorboard",
            "log_with": "tensorboard",
            "max_train_steps": steps,
            "gradient_checkpointing": True,
        }
        if self.tiny:
            usual["dit_dtype"] = "float32"
        tables = [self._table(work, steps) for work in works]
        (run / "dataset.toml").write_text(tomli_w.dumps({"datasets": tables}), "utf-8")
        (run / "train.toml").write_text(tomli_w.dumps(usual | options), "utf-8")

    def _table(self, name: str, repeats: int) -> dict[str, Any]:
        work = self.works[name]
        kind = "image" if work.frames is None else "video"
        table: dict[str, Any] = {
            f"{kind}_directory": str(self.folder / "caches" / "media"),
            "cache_directory": str(self.cache(name)),
            "resolution": [work.width, work.height],
            "caption_extension": ".txt",
            "batch_size": 1,
            "num_repeats": repeats,
            "enable_bucket": True,
            "bucket_no_upscale": False,
        }
        if work.frames is not None:
            table |= {"target_frames": [work.frames], "frame_extraction": "head"}
        return table


def read_files(path: Path) -> Files:
    """Read what :func:`describe_files` wrote."""
    values = json.loads(path.read_text("utf-8"))
    return Files(Path(values["folder"]), values["tiny"])


def describe_files(files: Files, path: Path) -> None:
    """Say to another process where the files lie."""
    path.write_text(json.dumps({"folder": str(files.folder), "tiny": files.tiny}), "utf-8")


def main() -> None:
    """Write the parts that are named, or the transformer, the LoRA and the works."""
    files, device, names = read_files(Path(sys.argv[1])), sys.argv[2], sys.argv[3:]
    parts = [name.removeprefix("part:") for name in names if name.startswith("part:")]
    for part in parts:
        files.write_part(part, device)
    if not parts:
        files.write_transformer(device)
        for work in names:
            files.write_work(work)


if __name__ == "__main__":
    main()
