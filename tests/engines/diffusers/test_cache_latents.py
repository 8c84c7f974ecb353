"""Pictures and clips to latents: the right pixels in, the right condition out, errors up front."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from runner.core.errors import UserError
from runner.engines.diffusers import cache_latents, models
from runner.engines.diffusers.make_weights import make_weights
from runner.formats import cache_files


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    make_weights(folder)
    return folder


def photograph(seed: int, frames: int = 1, width: int = 96, height: int = 64) -> np.ndarray:
    """Smooth shapes with some texture, [F, H, W, 3] uint8; later frames shift to the left."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    wide = Image.fromarray(small).resize((width + 4 * frames, height), Image.Resampling.BICUBIC)
    texture = random.normal(0, 8, (height, width + 4 * frames, 3))
    scene = (np.asarray(wide) + texture).clip(0, 255).astype(np.uint8)
    return np.stack([scene[:, 4 * frame : 4 * frame + width] for frame in range(frames)])


def dataset(folder: Path, kind: str, paths: list[Path], extra: str = "") -> Path:
    rows = [{f"{kind}_path": str(path), "caption": "a thing"} for path in paths]
    jsonl = folder / "items.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    toml = folder / "dataset.toml"
    toml.write_text(
        f"[[datasets]]\n{kind}_jsonl_file = '{jsonl}'\ncache_directory = '{folder / 'cache'}'\n"
        f"resolution = [96, 64]\nenable_bucket = true\n{extra}",
        encoding="utf-8",
    )
    return toml


# The VAE is given pixels from -1 to 1, channels first, and its most likely latents are kept as
# they are: neither sampled nor scaled.
def test_pixels_in_and_mode_out() -> None:
    seen: list[torch.Tensor] = []

    def encode(pixels: torch.Tensor) -> SimpleNamespace:
        seen.append(pixels)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.full((1, 2), 3.0)))

    frames = np.zeros((5, 16, 32, 3), dtype=np.uint8)
    frames[1, 2, 3] = (255, 51, 0)
    vae = SimpleNamespace(
        encode=encode, device="cpu", dtype=torch.float32, config=SimpleNamespace(scaling_factor=9)
    )
    assert torch.equal(cache_latents.encode_frames(vae, frames), torch.tensor([3.0, 3.0]))
    assert seen[0].shape == (1, 3, 5, 16, 32)
    assert seen[0][0, :, 1, 2, 3].tolist() == pytest.approx([1.0, -0.6, -1.0])
    assert seen[0].min() == -1.0


# The tiny VAE's latents are of a trainable size, and tell pictures apart.
def test_latents_of_pictures(weights: Path) -> None:
    vae = models.load_vae(weights / "vae")
    found = [cache_latents.encode_frames(vae, photograph(seed)) for seed in range(3)]
    for latents in found:
        assert latents.shape == (32, 1, 4, 6)
        assert 0.3 < latents.std() < 2
    assert (found[0] - found[1]).std() > 0.3
    assert (found[1] - found[2]).std() > 0.3


# i2v is given the first frame alone: its latents come first, zeros after, and the mask marks it.
# Nothing of the later frames, which are to be predicted, leaks in.
def test_first_frame_condition(weights: Path) -> None:
    vae = models.load_vae(weights / "vae")
    frames = photograph(0, frames=9)
    latents = cache_latents.encode_frames(vae, frames)
    condition = cache_latents.first_frame_condition(vae, frames, latents)
    assert condition.shape == (33, 3, 4, 6)
    assert condition.dtype == torch.float32
    assert torch.equal(condition[:32, 0], cache_latents.encode_frames(vae, frames[:1])[:, 0])
    assert not condition[:, 1:].any()
    assert bool((condition[32, 0] == 1).all())

    other = frames.copy()
    other[1:] = 255 - other[1:]
    again = cache_latents.first_frame_condition(vae, other, latents)
    assert torch.equal(condition, again)


# SigLIP's features are of the frame, in half precision as musubi keeps them.
def test_image_features(weights: Path) -> None:
    siglip = models.load_image_encoder(weights / "image_encoder")
    one, two = (cache_latents.image_features(*siglip, photograph(seed)[0]) for seed in (1, 2))
    assert one.shape == (16, 32)
    assert one.dtype == torch.float16
    assert (one - two).float().std() > 0.1


# --vae_sample_size tiles what is larger than a tile and nothing else, with the same shapes.
def test_tiling(weights: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.fromarray(photograph(0, width=96, height=64)[0]).save(picture)
    toml = dataset(tmp_path, "image", [picture])
    found = []
    for tile in ("0", "128", "64"):
        flags = ["--vae", str(weights / "vae"), "--vae_sample_size", tile]
        cache_latents.main(["--dataset_config", str(toml), *flags])
        found.append(
            cache_files.read_latents(tmp_path / "cache" / "p_0096x0064_hv15.safetensors").latents
        )
    assert torch.equal(found[0], found[1])
    assert found[2].shape == found[0].shape
    assert not torch.equal(found[0], found[2])


# A clip too short for every target is named, and gives no file; the count goes on.
def test_short_clips_are_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clips = [tmp_path / "short.mp4", tmp_path / "long.mp4"]
    for clip in clips:
        clip.touch()
    monkeypatch.setattr(
        cache_latents,
        "load_clip",
        lambda path, extraction, resolution: photograph(1, frames=3 if path == clips[0] else 6),
    )
    toml = dataset(tmp_path, "video", clips, 'target_frames = [5, 9]\nframe_extraction = "head"\n')
    cache_latents.main(["--dataset_config", str(toml), "--vae", str(weights / "vae")])
    assert capsys.readouterr().out.splitlines() == [
        "short.mp4: 3 frames are fewer than every target (5, 9)",
        "1/2 short.mp4",
        "2/2 long.mp4",
    ]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [
        "long_00000-005_0096x0064_hv15.safetensors"
    ]


# What is wrong is said in one line that names it, before any network is loaded (there is none at
# the path given here) and before anything is written.
@pytest.mark.parametrize(
    ("names", "flags", "said"),
    [
        (["a.png"], ["--i2v", "--image_encoder", "x"], "a dataset of pictures has none"),
        (["a.png"], ["--i2v"], "--image_encoder"),
        (["a.png"], ["--vae_sample_size", "100"], "multiple of 64"),
        (["a.png"], ["--vae_sample_size", "-64"], "multiple of 64"),
        (["a.png", "gone.png"], [], "gone.png: no such file"),
        (["a.png", "b/a.png"], [], "would have the same cache files"),
        ([], [], "nothing in its datasets"),
    ],
)
def test_errors_come_first(tmp_path: Path, names: list[str], flags: list[str], said: str) -> None:
    for name in names:
        if name != "gone.png":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    toml = dataset(tmp_path, "image", [tmp_path / name for name in names])
    with pytest.raises(UserError, match=said) as raised:
        cache_latents.main(["--dataset_config", str(toml), "--vae", "nowhere", *flags])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()


# A line of the dataset's list that can't be read is named by file and number.
@pytest.mark.parametrize("line", ["{", "[]", '{"image_path": "a.png"}', '{"video_path": "a"}'])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    toml = dataset(tmp_path, "image", [tmp_path / "a.png"])
    with (tmp_path / "items.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(UserError, match=r"items\.jsonl, line 3"):
        cache_latents.main(["--dataset_config", str(toml), "--vae", "nowhere"])


# A person who makes a mistake sees one line on stderr and exit code 2, never a traceback.
def test_command_line_errors(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", cache_latents.__name__, "--dataset_config", "no.toml", "--vae", "v"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no.toml")
    assert len(done.stderr.splitlines()) == 1


# Every executable ends with the exit code of its cause, after clean-up, and its output can be
# read line by line while it runs.
@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise UserError('one line')", 2, "error: one line\n"),
        ("raise StageError('one line')", 1, "error: one line\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_exit_codes(body: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", _program(body)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_sigterm_cleans_up_and_exits_143() -> None:
    program = _program(
        "import time\n try: print('started'); time.sleep(60)\n finally: print('cleaned')"
    )
    # As most shells start it; with this set, lines would come at once whatever the program does.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.stdout.readline() == "cleaned\n"
    assert process.returncode == 143


def _program(body: str) -> str:
    return (
        "from runner.engines.diffusers import cli\n"
        "from runner.core.errors import StageError, UserError\n"
        f"def main(arguments):\n {body}\ncli.run(main)"
    )
