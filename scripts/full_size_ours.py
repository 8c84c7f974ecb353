"""This project's side of check-full-size: loads the files that musubi-tuner's side wrote."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import check_common as common
import full_size
import torch
from check_engines import Diffusers
from full_size import Settings

sys.path.insert(0, str(common.TOP))
from runner.engines.diffusers import models, published


def transformer(settings: Settings, dtype: torch.dtype) -> Any:
    return models.load_transformer(
        settings.file("transformer"), dtype=dtype, device=settings.device
    )


def engine_of(settings: Settings, precision: str) -> Diffusers:
    low = precision == "bf16" and not settings.tiny
    dtype = torch.bfloat16 if low else torch.float32
    return Diffusers(transformer(settings, dtype), dtype, settings.device, True)


def part(settings: Settings, name: str, dtype: torch.dtype | None = None) -> Any:
    """Load a part as the runner does; the tiny one's size is not the published one."""
    file = settings.file(name)
    if not settings.tiny:
        return published.load(name, file, dtype=dtype, device=settings.device)
    sizes = {k: v for k, v in full_size.TINY_SIZES[name].items() if k != "num_decoder_layers"}
    if name == "text_encoder":
        sizes["rope_parameters"] = {**full_size.TINY_ROPE, "rope_theta": 1000000.0}
    model = published.build(name, file, **sizes)
    return published.fill(name, model, file, dtype=torch.float32, device=settings.device)


def dit(settings: Settings) -> None:
    for precision in full_size.precisions(settings, settings.cases):
        engine = engine_of(settings, precision)
        # The task is in the inputs alone.
        full_size.record_dit(
            "ours", settings, precision, {"t2v": engine, "i2v": engine}.__getitem__
        )
        if precision == "bf16":
            full_size.record_steps("ours", settings, engine)
            from runner.engines.diffusers.checkpoints import write_lora

            write_lora(settings.result("ours-lora"), dict(engine.network.state_dict()), {})
            full_size.record_loss("ours-own-lora", settings, engine)
        del engine
        full_size.free()


def lora(settings: Settings) -> None:
    from runner.engines.diffusers import network_files

    engine = engine_of(settings, "bf16")
    network: Any = engine.network
    network_files.start_from(network, str(settings.result("musubi-lora")))
    full_size.record_loss("ours-others-lora", settings, engine)


def vae(settings: Settings) -> None:
    from runner.engines.diffusers.cache_latents import encode_frames

    found: dict[str, torch.Tensor] = {}
    for precision, dtype in (("fp16", None), ("fp32", torch.float32)):
        for case, (frames, tile) in settings.vae_cases().items():
            network = part(settings, "vae", dtype)
            if tile:
                ratio = network.spatial_compression_ratio
                network.enable_tiling(tile, tile, tile // ratio, tile // ratio)
            found[f"{case}/{precision}"] = encode_frames(network, frames)
            del network
            full_size.free()
    full_size.save(settings.result("ours-vae"), found)


def text(settings: Settings) -> None:
    from runner.engines.diffusers.text_encoding import encode_captions, encode_glyphs

    found: dict[str, torch.Tensor] = {}
    tokenizer, encoder = published.text_tokenizer(), part(settings, "text_encoder")
    for row, states in enumerate(encode_captions(tokenizer, encoder, full_size.CAPTIONS)):
        found[f"qwen{row}/low"] = states.float()
    del encoder
    full_size.free()
    tokenizer, encoder = published.byt5_tokenizer(), part(settings, "byt5")
    for row, caption in enumerate(full_size.QUOTES):
        found[f"byt5{row}/low"] = encode_glyphs(tokenizer, encoder, caption).float()
    full_size.save(settings.result("ours-text"), found)


def vision(settings: Settings) -> None:
    from runner.engines.diffusers.cache_latents import image_features

    processor, encoder = published.image_processor(), part(settings, "image_encoder")
    if settings.tiny:
        edge = full_size.TINY_SIZES["image_encoder"]["image_size"]
        processor.size = {"height": edge, "width": edge}
    found = {"siglip/low": image_features(processor, encoder, settings.picture()).float()}
    full_size.save(settings.result("ours-vision"), found)


def loading(settings: Settings) -> None:
    """Measure the transformer's way from a warm file to the device, libraries imported before."""
    from diffusers.models.transformers import transformer_hunyuan_video15  # noqa: F401

    cuda = settings.device == "cuda"
    if cuda:
        torch.zeros(1, device="cuda")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    model = transformer(settings, torch.bfloat16)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - begun
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    size = sum(value.nbytes for value in model.parameters())
    values = {"seconds": seconds, "rise": rise, "peak": peak, "size": size}
    full_size.save(settings.result("ours-loading"), {
        name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()
    })  # fmt: skip


def tokenizers(settings: Settings) -> None:
    """Write small tokenizers that stand in for the published ones, and the tiny model's config.

    Their configs are those that transformers 4 reads too.
    """
    import json

    from runner.engines.diffusers import make_weights

    qwen = full_size.repository_folder(Path(settings.folder), "Qwen/Qwen-Image") / "tokenizer"
    byt5 = full_size.repository_folder(Path(settings.folder), "google/byt5-small")
    byt5.mkdir(parents=True, exist_ok=True)
    tokenizer = make_weights._tokenizer()
    tokenizer.save_pretrained(qwen)
    tokenizer.backend_tokenizer.model.save(str(qwen))
    (qwen / "tokenizer.json").unlink()
    added = {
        tokenizer.convert_tokens_to_ids(token): {"content": token, "special": True}
        for token in make_weights.SPECIAL_TOKENS
    }
    configs = {
        qwen / "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": added,
        },
        byt5 / "tokenizer_config.json": {
            **{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125},
            **{"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        },
        byt5 / "config.json": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    }
    for file, config in configs.items():
        file.write_text(json.dumps(config), "utf-8")
    if settings.tiny:
        tiny = {"_class_name": "HunyuanVideo15Transformer3DModel", **models.TINY_TRANSFORMER}
        file = settings.file("transformer").with_name("config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tiny), "utf-8")


def main() -> None:
    settings = Settings.read(Path(sys.argv[1]))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for action in sys.argv[2:]:
        {
            **{"dit": dit, "lora": lora, "vae": vae, "text": text, "vision": vision},
            **{"loading": loading, "tokenizers": tokenizers},
        }[action](settings)


if __name__ == "__main__":
    main()
