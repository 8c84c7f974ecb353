"""The rows that encode: media, captions, tokenizers, and what the cache files' times say."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import check_common as common
import full_size
from bench_files import Files, Work
from bench_rows import Row
from full_size import Settings

# As many as are encoded; captions go in batches of 4, as the runner has them.
COUNTS = {"image": 12, "clip": 8}
CAPTIONS, BATCH = 64, 4
# musubi-tuner's default.
_MUSUBI_TILE = 128
_HERE = Path(__file__).resolve().parent


def prepare(files: Files, device: str, rows: Sequence[Row]) -> None:
    """Write what encoding rows need: media, tokenizers and weights, once."""
    for row in rows:
        if row.kind == "latents":
            write_media(files.folder / "media" / row.work, files.works[row.work], COUNTS[row.work])
        if row.kind == "captions":
            write_captions(files.folder / "media" / "captions")
    parts = []
    if any(row.kind == "latents" for row in rows):
        parts.append("vae")
    if any(row.kind == "captions" for row in rows):
        parts += ["text_encoder", "byt5"]
    if files.tiny:
        return
    command = [sys.executable, str(_HERE / "bench_files.py"), str(files.folder / "files.json")]
    subprocess.run([*command, device, *(f"part:{part}" for part in parts)], check=True)
    if "byt5" in parts and not (files.folder / "hf").is_dir():
        settings = files.folder / "settings.json"
        Settings(str(files.folder), device, False, (), 0).write(settings)
        program = str(_HERE / "full_size_ours.py")
        subprocess.run([sys.executable, program, str(settings), "tokenizers"], check=True)
        for repository in ("Qwen/Qwen-Image", "google/byt5-small"):
            snapshot = full_size.repository_folder(files.folder, repository)
            refs = snapshot.parent.parent / "refs"
            refs.mkdir(parents=True, exist_ok=True)
            (refs / "main").write_text(full_size.COMMIT, "ascii")


def arguments(files: Files, row: Row, run: Path) -> list[str]:
    """Write dataset.toml of a row, and return the module to run with its arguments."""
    import tomli_w

    work = files.works[row.work]
    kind = "image" if work.frames is None else "video"
    media = files.folder / "media" / ("captions" if row.kind == "captions" else row.work)
    table: dict[str, Any] = {
        f"{kind}_directory": str(media),
        "cache_directory": "cache",
        "resolution": [work.width, work.height],
        "caption_extension": ".txt",
        "batch_size": 1,
        "num_repeats": 1,
        "enable_bucket": True,
        "bucket_no_upscale": False,
    }
    if work.frames is not None:
        table |= {"target_frames": [work.frames], "frame_extraction": "head"}
    (run / "cache").mkdir()
    (run / "dataset.toml").write_text(tomli_w.dumps({"datasets": [table]}), "utf-8")
    where = {part: str(files.folder / "tiny" / part if files.tiny else files.weights(part))
             for part in ("vae", "text_encoder", "byt5")}  # fmt: skip
    if row.kind == "latents":
        scripts = ("runner.engines.diffusers.cache_latents", "musubi_tuner.hv_1_5_cache_latents")
        tile = _MUSUBI_TILE if row.musubi else 0
        given = ["--vae", where["vae"], "--vae_sample_size", str(tile)]
    else:
        scripts = ("runner.engines.diffusers.cache_text",
                   "musubi_tuner.hv_1_5_cache_text_encoder_outputs")  # fmt: skip
        given = ["--text_encoder", where["text_encoder"], "--byt5", where["byt5"]]
        given += ["--batch_size", str(BATCH)]
    return [scripts[row.musubi], "--dataset_config", "dataset.toml", *given]


def figures(cache: Path) -> dict[str, Any]:
    """Return the seconds that an item took, from the times at which its files were written.

    The first batch is left out: it waits for the libraries' first calls.
    """
    times = sorted(file.stat().st_mtime_ns / 1e9 for file in cache.glob("*.safetensors"))
    if len(times) <= BATCH:
        return {}
    if len(times) >= CAPTIONS:
        return {"each": (times[-1] - times[BATCH - 1]) / (len(times) - BATCH)}
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {"each": common.median(steps[1:])}


def write_captions(folder: Path) -> None:
    """Write captions of 10 to 70 words beside small pictures, once."""
    from PIL import Image

    if folder.is_dir():
        return
    scratch = folder.with_suffix(".part")
    scratch.mkdir(parents=True)
    for number in range(CAPTIONS):
        words = "a wooden table with a cup of coffee, seen from above, " * (1 + number % 6)
        text = f'{words}and a sign that says "OPEN"'
        (scratch / f"{number:03d}.txt").write_text(text, "utf-8")
        Image.new("RGB", (64, 64)).save(scratch / f"{number:03d}.png")
    scratch.replace(folder)


def write_media(folder: Path, work: Work, count: int) -> None:
    """Write pictures, or clips of H.264, of a work's size, with captions beside them, once.

    Args:
        folder: where they are written.
        work: their size.
        count: how many.
    """
    import av
    import numpy as np
    from PIL import Image

    if folder.is_dir():
        return
    scratch = folder.with_suffix(".part")
    scratch.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        small = random.integers(0, 255, (work.height // 16, work.width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((work.width, work.height), Image.Resampling.BICUBIC)
        name = scratch / f"{number:03d}"
        name.with_suffix(".txt").write_text("coloured squares", "utf-8")
        if work.frames is None:
            picture.save(name.with_suffix(".png"))
            continue
        with av.open(str(name.with_suffix(".mp4")), "w") as container:
            stream: Any = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = work.width, work.height, "yuv420p"
            for frame in range(work.frames):
                moved = np.roll(np.asarray(picture), frame * 4, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, "rgb24")))
            container.mux(stream.encode(None))
    scratch.replace(folder)
