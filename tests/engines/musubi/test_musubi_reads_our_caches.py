"""What the caching stages leave behind, pinned file for file.

musubi-tuner v0.3.4 was run by hand on files made so: its datasets read them into batches, and its
own caching code, given the same tiny networks, wrote the same names and metadata and, bit for bit,
the same latents. (Its siglip, byt5 and vl_embed have the networks' types, here float32; ours are
cast to what the published weights' precision gives: float16, float16 and bfloat16.)
"""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from runner.engines.diffusers import cache_latents, cache_text
from runner.engines.diffusers.make_weights import make_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "weights"
    make_weights(folder)
    return folder


def picture(width: int, height: int, phase: float) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / 40
    waves = [np.sin(x * (1 + c) + phase) * np.cos(y - c * phase) for c in range(3)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def write_clip(path: Path, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 144, 96, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(144, 96, index / 8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def encode(folder: Path, weights: Path, i2v: bool) -> dict[str, tuple[dict, dict]]:
    """Run both stages; for each file its keys with (type, shape), and its metadata."""
    datasets = ""
    media: dict[str, list[str]] = {"video": ["clip.mp4"]} | ({} if i2v else {"image": ["p.q.png"]})
    write_clip(folder / "clip.mp4", 14)
    Image.fromarray(picture(150, 80, 0.5)).save(folder / "p.q.png")
    for kind, names in media.items():
        rows = [{f"{kind}_path": str(folder / name), "caption": 'says "HI"'} for name in names]
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        datasets += f"""
            [[datasets]]
            {kind}_jsonl_file = '{folder / kind}.jsonl'
            cache_directory = '{folder / "cache" / kind}'
            resolution = [96, 64]
            enable_bucket = true
        """ + ("target_frames = [5, 13]\nframe_extraction = 'head'\n" if kind == "video" else "")
    toml = folder / "dataset.toml"
    toml.write_text(datasets)
    config = ["--dataset_config", str(toml)]
    siglip = ["--i2v", "--image_encoder", str(weights / "image_encoder")] if i2v else []
    cache_latents.main([*config, "--vae", str(weights / "vae"), *siglip])
    cache_text.main(
        [*config, "--text_encoder", str(weights / "text_encoder"), "--byt5", str(weights / "byt5")]
    )
    found = {}
    for path in sorted((folder / "cache").rglob("*")):
        if path.is_file():
            with safe_open(str(path), framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                keys = {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}
                found[str(path.relative_to(folder / "cache"))] = keys, file.metadata()
    return found


def latents_metadata(width: int, height: int, frames: int | None = None) -> dict[str, str]:
    return {
        "architecture": "hunyuan_video_1_5",
        "width": str(width),
        "height": str(height),
        "format_version": "1.0.1",
    } | ({} if frames is None else {"frame_count": str(frames)})


TEXT = (
    {
        "varlen_vl_embed_bfloat16": ("BF16", [16, 64]),
        "varlen_byt5_embed_float16": ("F16", [12, 32]),
    },
    {"architecture": "hunyuan_video_1_5", "caption1": 'says "HI"', "format_version": "1.0.1"},
)


# t2v: latents alone. A picture's name and metadata have its own size, a crop's its bucket's.
def test_t2v(weights: Path, tmp_path: Path) -> None:
    assert encode(tmp_path, weights, i2v=False) == {
        "image/p.q_0150x0080_hv15.safetensors": (
            {"latents_1x4x6_float32": ("F32", [32, 1, 4, 6])},
            latents_metadata(150, 80),
        ),
        "image/p.q_hv15_te.safetensors": TEXT,
        "video/clip_00000-005_0096x0064_hv15.safetensors": (
            {"latents_2x4x6_float32": ("F32", [32, 2, 4, 6])},
            latents_metadata(96, 64, 5),
        ),
        "video/clip_00000-013_0096x0064_hv15.safetensors": (
            {"latents_4x4x6_float32": ("F32", [32, 4, 4, 6])},
            latents_metadata(96, 64, 13),
        ),
        "video/clip_hv15_te.safetensors": TEXT,
    }


# i2v: beside the latents, the first frame's (33 channels, the last a mask) and SigLIP's features.
def test_i2v(weights: Path, tmp_path: Path) -> None:
    assert encode(tmp_path, weights, i2v=True) == {
        f"video/clip_00000-{frames:03d}_0096x0064_hv15.safetensors": (
            {
                f"latents_{latent}x4x6_float32": ("F32", [32, latent, 4, 6]),
                f"latents_image_{latent}x4x6_float32": ("F32", [33, latent, 4, 6]),
                "siglip_float16": ("F16", [16, 32]),
            },
            latents_metadata(96, 64, frames),
        )
        for frames, latent in ((5, 2), (13, 4))
    } | {"video/clip_hv15_te.safetensors": TEXT}
