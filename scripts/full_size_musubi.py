"""musubi-tuner's side of check-full-size: writes the weights, and records what musubi computes.

It runs in musubi-tuner's Python (3.10 or newer), with the settings in a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import check_common as common
import full_size
import torch
from check_engines import Musubi
from full_size import Settings

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: Any) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@contextlib.contextmanager
def options_changed(module: Any, name: str, sizes: dict[str, Any]) -> Iterator[None]:
    """Give a class of musubi's other options than its own: the tiny model's sizes."""
    real = getattr(module, name)
    setattr(module, name, lambda **options: real(**full_size.merged(options, sizes)))
    try:
        yield
    finally:
        setattr(module, name, real)


def made_by(module: Any, name: str, load: Callable[[], Any]) -> Any:
    """Return the network that a loader makes before it misses the weights of an empty file."""
    real, made = getattr(module, name), []

    def remember(*arguments: Any, **options: Any) -> Any:
        made.append(real(*arguments, **options))
        return made[-1]

    setattr(module, name, remember)
    try:
        load()
    except (RuntimeError, NotImplementedError):
        return made[-1]
    finally:
        setattr(module, name, real)
    raise SystemExit("a file without weights was loaded; is this musubi-tuner v0.3.4?")


class Side:
    """musubi-tuner's loaders, at full size or at the tiny model's."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device

    def transformer_shapes(self) -> Shapes:
        from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_models as module

        return shapes_of(module.create_model("t2v", "torch", False, None))

    def transformer(self, dtype: torch.dtype) -> Any:
        from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_models as module

        device, path = self.device, str(self.settings.file("transformer"))
        return module.load_hunyuan_video_1_5_model(
            device, "t2v", path, "torch", False, device, dtype
        )

    def vae_shapes(self) -> Shapes:
        from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_vae as module

        empty = str(self.settings.empty())

        def load() -> None:
            module.load_vae_from_checkpoint(empty, torch.device("cpu"), torch.float32, 0)

        with options_changed(module, "AutoencoderKLConv3D", self.settings.sizes("vae")):
            return shapes_of(made_by(module, "AutoencoderKLConv3D", load))

    def vae(self, dtype: torch.dtype, tile: int) -> Any:
        from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_vae as module

        with options_changed(module, "AutoencoderKLConv3D", self.settings.sizes("vae")):
            path, device = str(self.settings.file("vae")), torch.device(self.device)
            return module.load_vae_from_checkpoint(path, device, dtype, sample_size=tile).eval()

    def byt5_shapes(self) -> Shapes:
        from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_text_encoder as module

        made: list[Any] = []
        add = module.add_special_token

        def remember(tokenizer: Any, encoder: Any) -> None:
            add(tokenizer, encoder)
            made.append(encoder)

        module.add_special_token = remember
        empty = {"shared.weight": torch.zeros(0)}
        sizes = self.settings.sizes("byt5")
        with options_changed(module, "T5Config", sizes), contextlib.suppress(RuntimeError):
            module.load_byt5("", torch.float32, "cpu", state_dict=empty)
        module.add_special_token = add
        return {
            "shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}": shape
            for name, shape in shapes_of(made[-1]).items()
        }

    def byt5(self, dtype: torch.dtype) -> Any:
        from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_text_encoder as module

        with options_changed(module, "T5Config", self.settings.sizes("byt5")):
            path = str(self.settings.file("byt5"))
            return module.load_byt5(path, dtype, self.device, disable_mmap=True)

    def image_encoder_shapes(self) -> Shapes:
        from musubi_tuner.frame_pack import framepack_utils as module

        options = {**module.IMAGE_ENCODER_CONFIG, **self.settings.sizes("image_encoder")}
        with torch.device("meta"):
            config = module.SiglipVisionConfig(**options)
            return shapes_of(module.SiglipVisionModel._from_config(config))

    def image_encoder(self) -> Any:
        from musubi_tuner.frame_pack import framepack_utils as module

        with options_changed(module, "SiglipVisionConfig", self.settings.sizes("image_encoder")):
            path = str(self.settings.file("image_encoder"))
            processor, encoder = module.load_image_encoders(argparse.Namespace(image_encoder=path))
        if self.settings.tiny:
            edge = self.settings.sizes("image_encoder")["image_size"]
            processor.size = {"height": edge, "width": edge}
        return processor, encoder.to(self.device)

    def text_encoder_shapes(self) -> Shapes:
        from musubi_tuner.qwen_image import qwen_image_utils as module

        made: list[Any] = []
        build = module.Qwen2_5_VLForConditionalGeneration._from_config

        def remember(*arguments: Any, **options: Any) -> Any:
            made.append(build(*arguments, **options))
            return made[-1]

        module.Qwen2_5_VLForConditionalGeneration._from_config = remember
        sizes = self.settings.sizes("qwen")
        with options_changed(module, "Qwen2_5_VLConfig", sizes), contextlib.suppress(RuntimeError):
            module.load_qwen2_5_vl("", torch.bfloat16, "cpu", state_dict={})
        module.Qwen2_5_VLForConditionalGeneration._from_config = build
        found = {}
        for name, shape in shapes_of(made[-1]).items():
            name = name.replace("model.visual.", "visual.")
            found[name.replace("model.language_model.", "model.")] = shape
        return found

    def text_encoder(self) -> Any:
        from musubi_tuner.qwen_image import qwen_image_utils as module

        with options_changed(module, "Qwen2_5_VLConfig", self.settings.sizes("qwen")):
            path = str(self.settings.file("text_encoder"))
            return module.load_qwen2_5_vl(path, torch.bfloat16, self.device, disable_mmap=True)


def write(side: Side, parts: list[str]) -> None:
    """Write the weight files of the parts: names and shapes are what musubi's loaders demand."""
    from safetensors.torch import save_file

    dtypes = {"transformer": torch.bfloat16, "text_encoder": torch.bfloat16}
    for part in parts:
        shapes: Shapes = getattr(side, f"{part}_shapes")()
        dtype = dtypes.get(part, torch.float16)
        deviation = 0.5 if part == "transformer" else 1.0
        tensors = {}
        for name, shape in shapes.items():
            values = common.weight(f"{part}/{name}", shape, side.device, deviation)
            tensors[name] = values.to(dtype).cpu()
        path = side.settings.file(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        print(f"{part}: {len(tensors)} tensors, {path.stat().st_size / 1e9:.2f} GB", flush=True)


def dit(side: Side) -> None:
    """Record outputs, gradients and losses of the transformer in bf16, then in float32."""
    settings = side.settings
    for precision in full_size.precisions(settings, settings.cases):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        if settings.tiny:
            dtype = torch.float32
        # The two tasks differ in the inputs alone, and LoRA modules are applied once.
        engine = Musubi(side.transformer(dtype), "t2v", dtype, side.device, True)

        def for_task(task: str, engine: Musubi = engine) -> Musubi:
            engine.trainer._i2v_training = task == "i2v"
            return engine

        full_size.record_dit("musubi", settings, precision, for_task)
        if precision == "bf16":
            engine.trainer._i2v_training = False
            full_size.record_steps("musubi", settings, engine)
            full_size.record_steps("musubi-again", settings, engine)
            engine.network.save_weights(str(settings.result("musubi-lora")), None, None)
            full_size.record_loss("musubi-own-lora", settings, engine)
        del engine, for_task
        full_size.free()


def lora(side: Side) -> None:
    """Record the first loss with the LoRA that the other engine wrote."""
    compute = torch.float32 if side.settings.tiny else torch.bfloat16
    model = side.transformer(compute)
    engine = Musubi(model, "t2v", compute, side.device, True)
    info = engine.network.load_weights(str(side.settings.result("ours-lora")))
    if info.missing_keys or info.unexpected_keys:
        raise SystemExit(f"musubi-tuner does not take the LoRA file: {info}")
    full_size.record_loss("musubi-others-lora", side.settings, engine)


def vae(side: Side) -> None:
    found: dict[str, torch.Tensor] = {}
    for precision in ("fp16", "fp32"):
        dtype = torch.float16 if precision == "fp16" and not side.settings.tiny else torch.float32
        for case, (frames, tile) in side.settings.vae_cases().items():
            network = side.vae(dtype, tile)
            pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).contiguous()
            pixels = pixels.to(side.device, dtype) / 127.5 - 1.0
            with torch.no_grad(), torch.autocast(side.device, dtype, dtype != torch.float32):
                found[f"{case}/{precision}"] = network.encode(pixels)[0].mode()[0].cpu()
            del network
            full_size.free()
    full_size.save(side.settings.result("musubi-vae"), found)


def text(side: Side) -> None:
    from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_text_encoder as module

    found: dict[str, torch.Tensor] = {}
    tokenizer, network = side.text_encoder()

    def encode(name: str, network: Any = network) -> None:
        states, mask = module.get_qwen_prompt_embeds(tokenizer, network, full_size.CAPTIONS)
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            found[f"qwen{row}/{name}"] = states[row, :length].float().cpu().clone()

    encode("low")
    network.float()
    encode("fp32")
    rotary = network.model.language_model.rotary_emb
    rotary.inv_freq = rotary.rope_init_fn(rotary.config, torch.device(side.device))[0]
    encode("exact")
    del network, rotary, encode
    full_size.free()
    for precision in ("low", "fp32"):
        dtype = torch.float16 if precision == "low" and not side.settings.tiny else torch.float32
        tokenizer, encoder = side.byt5(dtype)
        for row, caption in enumerate(full_size.QUOTES):
            states, mask = module.get_glyph_prompt_embeds(tokenizer, encoder, caption)
            length = int(mask.sum())
            found[f"byt5{row}/{precision}"] = states[0, :length].float().cpu().clone()
    full_size.save(side.settings.result("musubi-text"), found)


def vision(side: Side) -> None:
    from musubi_tuner.frame_pack.clip_vision import hf_clip_vision_encode

    found: dict[str, torch.Tensor] = {}
    processor, encoder = side.image_encoder()
    with torch.no_grad():
        for precision in ("low", "fp32"):
            encoder = encoder.float() if precision == "fp32" or side.settings.tiny else encoder
            states = hf_clip_vision_encode(side.settings.picture(), processor, encoder)
            found[f"siglip/{precision}"] = states.last_hidden_state[0].float().cpu()
    full_size.save(side.settings.result("musubi-vision"), found)


def main() -> None:
    settings = Settings.read(Path(sys.argv[1]))
    side = Side(settings)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for action in sys.argv[2:]:
        if action.startswith("write:"):
            write(side, action.removeprefix("write:").split(","))
        else:
            {"dit": dit, "lora": lora, "vae": vae, "text": text, "vision": vision}[action](side)
        gc.collect()


if __name__ == "__main__":
    main()
