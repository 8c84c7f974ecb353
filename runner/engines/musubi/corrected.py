# Runs a module with corrections to musubi-tuner's behaviour:
# corrected.py [--scale_condition] -m MODULE ...
import ctypes
import glob
import importlib
import os
import platform
import runpy
import signal
import sys
from typing import Any

scale_condition = sys.argv[1] == "--scale_condition"
del sys.argv[: 3 if scale_condition else 2]
module = sys.argv[0]

# accelerate starts the trainer, which would otherwise outlive it when it is killed.
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

# The shell's environment may hold variables that make accelerate wait for other processes (of
# torchrun, Slurm and MPI) or override its arguments (ACCELERATE_*, which its launcher then sets for
# the trainer), that make transformers 4 ignore the Hugging Face cache, and secrets.
gone = "LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PMI_SIZE"
gone += " OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE"
gone += " TRANSFORMERS_CACHE PYTORCH_TRANSFORMERS_CACHE PYTORCH_PRETRAINED_BERT_CACHE"
if "HF_HUB_OFFLINE" in os.environ:
    gone += " HF_TOKEN HUGGING_FACE_HUB_TOKEN"
starts = ("MLFLOW_", "ACCELERATE_")[: 1 if module.endswith("train_network") else 2]
for name in [*os.environ]:
    if name in gone.split() or name.startswith(starts):
        del os.environ[name]

# Samples of many shapes fragment PyTorch's GPU memory: 24.8 GB in use instead of 21.9 GB with
# expandable segments, which WSL does not support. Torch 2.9 reads only the older of the two names.
names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
wsl = "microsoft" in platform.release().lower()
if sys.platform == "linux" and not wsl and not any(name in os.environ for name in names):
    os.environ[names[0]] = "expandable_segments:True"

# musubi-tuner takes its items in the order in which the file system lists the cache files. That
# differs between disks, so the same seed would give different results.
original_glob = glob.glob
glob.glob = lambda *args, **kwargs: sorted(original_glob(*args, **kwargs))

# The text encoder's language-model head computes unused logits: 1.4 GB, too much for a GPU with
# 12 GB.
if module.endswith("cache_text_encoder_outputs"):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration as Encoder

    def headless(self: Any, *args: Any, forward: Any = Encoder.forward, **kwargs: Any) -> Any:
        self.lm_head = torch.nn.Identity()
        return forward(self, *args, **kwargs, logits_to_keep=1)

    Encoder.forward = headless  # type: ignore[method-assign]

# FFmpeg 7.1, which is in the pinned PyAV, can wait for ever when it decodes a frame of HEVC in
# several threads (wavefronts). The script decodes several clips at a time in any case.
if module.endswith("cache_latents"):
    import av

    def open_media(*args: Any, opened: Any = av.open, **kwargs: Any) -> Any:
        container = opened(*args, **kwargs)
        for stream in container.streams.video:
            if stream.codec_context.name == "hevc":
                stream.codec_context.thread_count = 1
        return container

    av.open = open_media

# musubi-tuner trains i2v with the first frame's latent as the cache has it, while its own previews,
# ComfyUI and the published pipelines multiply that by the VAE's factor. The last of the 33 channels
# is a mask. The LoRA file says so; a file without the key was trained unscaled.
if scale_condition:
    trainer = importlib.import_module("musubi_tuner.training.trainer_base")
    vae = importlib.import_module("musubi_tuner.hunyuan_video_1_5.hunyuan_video_1_5_vae")

    def process_batch(
        *args: Any, process: Any = trainer.NetworkTrainer.process_batch, **kwargs: Any
    ) -> Any:
        condition = args[5]["latents_image"].clone()
        condition[:, : vae.VAE_LATENT_CHANNELS] *= vae.VAE_SCALING_FACTOR
        batch = {**args[5], "latents_image": condition}
        return process(*args[:5], batch, *args[6:], **kwargs)

    def build_metadata(
        *args: Any, build: Any = trainer.sai_model_spec.build_metadata, **kwargs: Any
    ) -> Any:
        return {**build(*args, **kwargs), "ss_i2v_unscaled_condition": "False"}

    trainer.NetworkTrainer.process_batch = process_batch
    trainer.sai_model_spec.build_metadata = build_metadata

runpy.run_module(module, run_name="__main__", alter_sys=True)
