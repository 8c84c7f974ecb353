# Runs a module with corrections to musubi-tuner's behaviour: corrected.py -m MODULE ...
import ctypes
import glob
import os
import platform
import runpy
import signal
import sys
from typing import Any

del sys.argv[:2]
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

runpy.run_module(module, run_name="__main__", alter_sys=True)
