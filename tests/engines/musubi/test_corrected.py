"""``corrected.py``, through which musubi-tuner's modules are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import compose, fake_facts, fake_item, plan_of
from media_factory import make_clip

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
CLIPS = """
import sys
import av

for path in sys.argv[1:]:
    with av.open(path) as container:
        (stream,) = container.streams.video
        frames = sum(1 for _ in container.decode(video=0))
        print(stream.codec_context.name, stream.codec_context.thread_count == 1, frames)
with av.open("new.mp4", mode="w") as container:
    print(len(container.streams))
"""
# What of a training step and of a file's metadata is corrected.
TRAINER = """
from . import sai_model_spec

class NetworkTrainer:
    def process_batch(self, args, accelerator, transformer, network, batch, latents):
        return batch["latents_image"].tolist(), batch["other"], latents
"""
TRAIN = """
import numpy
from musubi_tuner.training.trainer_base import NetworkTrainer, sai_model_spec

class Tensor(numpy.ndarray):
    clone = numpy.ndarray.copy

cached = numpy.ones((1, 33, 1, 1, 1)).view(Tensor)
batch = {"latents_image": cached, "other": "as it was"}
values, *others = NetworkTrainer().process_batch(0, 0, 0, 0, batch, "latents")
values = [value[0][0][0] for value in values[0]]
print(set(values[:32]), values[32:], others, cached.sum().item())
print(sai_model_spec.build_metadata("a title", reso=1))
"""


def run_corrected(
    folder: Path,
    module: str,
    *arguments: str,
    release: str = "6.8",
    shim: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
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
    (packages / "musubi_tuner" / "hv_1_5_cache_latents.py").write_text(CLIPS)
    (packages / "musubi_tuner" / "scaled_train_network.py").write_text(TRAIN)
    training = packages / "musubi_tuner" / "training"
    training.mkdir()
    (training / "trainer_base.py").write_text(TRAINER)
    (training / "sai_model_spec.py").write_text(
        "def build_metadata(title, reso): return {'title': title, 'reso': reso}"
    )
    (packages / "musubi_tuner" / "hunyuan_video_1_5").mkdir()
    (packages / "musubi_tuner" / "hunyuan_video_1_5" / "hunyuan_video_1_5_vae.py").write_text(
        "VAE_LATENT_CHANNELS = 32\nVAE_SCALING_FACTOR = 1.03682"
    )
    (packages / "torch.py").write_text("class nn:\n    class Identity: pass")
    done = subprocess.run(
        [sys.executable, "corrected.py", *shim, "-m", f"musubi_tuner.{module}", *arguments],
        cwd=run,
        env={**os.environ, "PYTHONPATH": str(packages), **(env or {})},
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
    assert run_corrected(tmp_path / "c", "memory", env=own) == "['max_split_size_mb:64']"


# What a shell holds of other launchers, old caches and secrets reaches neither accelerate nor the
# trainer; what accelerate tells the trainer does, and a token where an upload was asked for.
def test_the_shell_is_cleared(tmp_path: Path) -> None:
    others = "LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PMI_SIZE "
    others += "OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE TRANSFORMERS_CACHE "
    others += "PYTORCH_TRANSFORMERS_CACHE PYTORCH_PRETRAINED_BERT_CACHE ACCELERATE_X"
    shell = dict.fromkeys(others.split(), "1")
    shell |= {"MLFLOW_TRACKING_PASSWORD": "p", "HF_TOKEN": "t", "HF_HOME": "/hf"}

    def left(folder: str, module: str, **more: str) -> set[str]:
        output = run_corrected(tmp_path / folder, module, env={**shell, **more})
        return set(json.loads(output)) & set(shell)

    assert left("a", "launch", HF_HUB_OFFLINE="1") == {"HF_HOME"}
    trainer = "hv_1_5_train_network"
    assert left("b", trainer, HF_HUB_OFFLINE="1") == {"HF_HOME", "ACCELERATE_X"}
    assert left("c", trainer) == {"HF_HOME", "ACCELERATE_X", "HF_TOKEN"}


# Captions are encoded without the language model's head, whose scores nothing reads.
def test_text_is_encoded_without_the_head(tmp_path: Path) -> None:
    output = run_corrected(tmp_path, "cache_text_encoder_outputs", "--fp8_vl")
    assert output == "('ids', 1, 'Identity') ['--fp8_vl']"


# musubi-tuner's PyAV can wait for ever when it decodes HEVC in several threads, so HEVC gets one;
# other clips keep theirs, and files that are written are opened as before.
def test_hevc_is_decoded_in_one_thread(tmp_path: Path) -> None:
    clips = [
        make_clip(tmp_path / f"{codec}.mp4", 5, codec=codec) for codec in ("libx265", "libx264")
    ]
    output = run_corrected(tmp_path, "hv_1_5_cache_latents", *map(str, clips))
    assert output.splitlines()[-3:] == ["hevc True 5", "h264 False 5", "0"]


# With the argument, the latent of the i2v condition is scaled and its mask, the cache's tensor and
# all else are not, and the LoRA file says so. Without it, nothing is changed.
@pytest.mark.parametrize("scaled", [True, False])
def test_the_i2v_condition_is_scaled(tmp_path: Path, scaled: bool) -> None:
    shim = ("--scale_condition",) if scaled else ()
    output = run_corrected(tmp_path, "scaled_train_network", shim=shim)
    step, metadata = output.splitlines()
    factor = 1.03682 if scaled else 1.0
    assert step == f"{{{factor}}} [1.0] ['as it was', 'latents'] 33.0"
    key = {"ss_i2v_unscaled_condition": "False"} if scaled else {}
    assert metadata == str({"title": "a title", "reso": 1, **key})


# i2v is trained scaled unless the option or experiment=original leaves it; t2v has no condition.
@pytest.mark.parametrize(
    ("words", "scaled"),
    [
        (("task=i2v",), True),
        (("task=i2v", "engine.arguments=command_line"), True),
        (("task=i2v", "training.i2v_unscaled_condition=true"), False),
        (("task=i2v", "experiment=original"), False),
        (("experiment=original",), False),
        (("task=t2v",), False),
    ],
)
def test_when_the_condition_is_scaled(words: tuple[str, ...], scaled: bool) -> None:
    config = compose("engine=musubi", *words)
    plan = plan_of(config, fake_facts(config, [fake_item("clip.mp4")]))
    command = plan.stage("train").commands[0]
    programs = command.argv[command.argv.index("accelerate.commands.launch") :]
    assert ("--scale_condition" in programs) is scaled
    if scaled:
        place = programs.index("--scale_condition")
        assert programs[place - 1] == "corrected.py" and programs[place + 1] == "-m"
    assert not [notice for notice in plan.notices if "unscaled" in notice]
