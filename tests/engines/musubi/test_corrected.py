"""``corrected.py``, through which musubi-tuner's modules are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import compose, fake_facts, fake_item, plan_of

MODULE = "import glob, sys\nprint(glob.glob('*'), sys.argv[1:], __name__)\n"
SHELL = "import json, os\nprint(json.dumps(dict(os.environ)))\n"
MEMORY = "import os\nprint([v for k, v in os.environ.items() if k.endswith('_ALLOC_CONF')])\n"
ENCODER = """
class Qwen2_5_VLForConditionalGeneration:
    lm_head = "a head"

    def forward(self, ids, logits_to_keep=0):
        return ids, logits_to_keep, type(self.lm_head).__name__
"""
TEXT = """
import sys
from transformers import Qwen2_5_VLForConditionalGeneration as Encoder

print(Encoder().forward("ids"), sys.argv[1:])
"""


def run_corrected(
    folder: Path, module: str, *arguments: str, release: str = "6.8", **env: str
) -> str:
    """What a module of a made-up musubi-tuner prints when it is run through corrected.py."""
    config = compose("engine=musubi")
    files = dict(plan_of(config, fake_facts(config, [fake_item("a.png")])).files)
    run, packages = folder / "run", folder / "packages"
    run.mkdir(parents=True)
    (packages / "musubi_tuner").mkdir(parents=True)
    (run / "corrected.py").write_text(files["corrected.py"])
    # A file system that lists its files in no order.
    (packages / "glob.py").write_text("def glob(pattern, recursive=False): return ['b', 'c', 'a']")
    (packages / "platform.py").write_text(f"def release(): return {release!r}")
    (packages / "musubi_tuner" / "train.py").write_text(MODULE)
    (packages / "musubi_tuner" / "memory.py").write_text(MEMORY)
    for script in ("launch", "hv_1_5_train_network"):
        (packages / "musubi_tuner" / f"{script}.py").write_text(SHELL)
    (packages / "musubi_tuner" / "cache_text_encoder_outputs.py").write_text(TEXT)
    (packages / "transformers.py").write_text(ENCODER)
    (packages / "torch.py").write_text("class nn:\n    class Identity: pass")
    done = subprocess.run(
        [sys.executable, "corrected.py", "-m", f"musubi_tuner.{module}", *arguments],
        cwd=run,
        env={**os.environ, "PYTHONPATH": str(packages), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The order of the items, and so what a seed gives, does not depend on the file system.
def test_the_cache_is_read_in_order(tmp_path: Path) -> None:
    output = run_corrected(tmp_path, "train", "--config_file", "a b.toml")
    assert output == "['a', 'b', 'c'] ['--config_file', 'a b.toml'] __main__"


# Memory is taken in segments that grow, but for WSL, which has none, and the user's own setting.
def test_memory_is_taken_in_segments_that_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert run_corrected(tmp_path / "a", "memory") == "['expandable_segments:True']"
    wsl = "5.15.90.1-microsoft-standard-WSL2"
    assert run_corrected(tmp_path / "b", "memory", release=wsl) == "[]"
    own = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    assert run_corrected(tmp_path / "c", "memory", **own) == "['max_split_size_mb:64']"


# What a shell holds of other launchers, old caches and secrets reaches neither accelerate nor the
# trainer; what accelerate tells the trainer does, and a token where an upload was asked for.
def test_the_shell_is_cleared(tmp_path: Path) -> None:
    others = "LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PMI_SIZE "
    others += "OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE TRANSFORMERS_CACHE "
    others += "PYTORCH_TRANSFORMERS_CACHE PYTORCH_PRETRAINED_BERT_CACHE ACCELERATE_X"
    shell = dict.fromkeys(others.split(), "1")
    shell |= {"MLFLOW_TRACKING_PASSWORD": "p", "HF_TOKEN": "t", "HF_HOME": "/hf"}

    def left(folder: str, module: str, **more: str) -> set[str]:
        output = run_corrected(tmp_path / folder, module, **shell, **more)
        return set(json.loads(output)) & set(shell)

    assert left("a", "launch", HF_HUB_OFFLINE="1") == {"HF_HOME"}
    trainer = "hv_1_5_train_network"
    assert left("b", trainer, HF_HUB_OFFLINE="1") == {"HF_HOME", "ACCELERATE_X"}
    assert left("c", trainer) == {"HF_HOME", "ACCELERATE_X", "HF_TOKEN"}


# Captions are encoded without the language model's head, whose scores nothing reads.
def test_text_is_encoded_without_the_head(tmp_path: Path) -> None:
    output = run_corrected(tmp_path, "cache_text_encoder_outputs", "--fp8_vl")
    assert output == "('ids', 1, 'Identity') ['--fp8_vl']"
