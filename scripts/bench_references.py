"""Record float32 gradients, and how far from them both engines are, uncompiled and in bf16.

    bench_references.py FILES.json ours|musubi WORK ...

The gradients are those of a work's checked step from the bench's LoRA. ``ours`` runs in this
project's Python and writes the reference; ``musubi`` runs in musubi-tuner's.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import check_common as common
import torch
from bench_files import Files, read_files
from check_engines import Diffusers, Engine, Musubi
from safetensors import safe_open


def ours(files: Files, device: str, dtype: torch.dtype) -> Engine:
    from runner.engines.diffusers import models, network_files

    model = models.load_transformer(files.transformer, dtype=dtype, device=device)
    engine = Diffusers(model, dtype, device, True)
    network: Any = engine.network
    network_files.start_from(network, str(files.lora))
    return engine


def musubi(files: Files, device: str, dtype: torch.dtype) -> Engine:
    from musubi_tuner.hunyuan_video_1_5 import hunyuan_video_1_5_models as module

    path = str(files.transformer)
    model = module.load_hunyuan_video_1_5_model(device, "t2v", path, "torch", False, device, dtype)
    engine = Musubi(model, "t2v", dtype, device, True)
    info = engine.network.load_weights(str(files.lora))
    if info.missing_keys or info.unexpected_keys:
        raise SystemExit(f"musubi-tuner does not take the LoRA file: {info}")
    return engine


def main() -> None:
    files, side, works = read_files(Path(sys.argv[1])), sys.argv[2], sys.argv[3:]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = "cpu" if files.tiny else "cuda"
    low = torch.float32 if files.tiny else torch.bfloat16
    if side == "ours":
        from safetensors.torch import save_file

        engine = ours(files, device, torch.float32)
        for work in works:
            _, _, found = engine.gradients(files.read_inputs(work))
            path = files.gradients(work)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {name: value.cpu() for name, value in found.items() if value is not None}
            save_file(kept, path)
            print(f"{work}: {len(kept)} gradients in float32", flush=True)
        del engine, found
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    engine = {"ours": ours, "musubi": musubi}[side](files, device, low)
    for work in works:
        inputs = files.read_inputs(work)
        if isinstance(engine, Musubi):
            engine.trainer._i2v_training = inputs.condition is not None
        _, _, found = engine.gradients(inputs)
        with safe_open(files.gradients(work), framework="pt", device=device) as file:
            reference = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        result = common.errors({**dict.fromkeys(reference), **found}, reference)
        path = files.gradients(work).with_name(f"{work}-{side}.json")
        path.write_text(json.dumps(result), "utf-8")
        print(f"{work}: {max(result.values()):.4f} at most, {side}", flush=True)


if __name__ == "__main__":
    main()
