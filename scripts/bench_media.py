"""Media, captions and tokenizers for the rows that encode."""

from __future__ import annotations

from pathlib import Path

from bench_files import Work

CAPTIONS = 32


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
        words = "a wooden table with a cup of coffee, seen from above, " * (1 + number % 6)
        name.with_suffix(".txt").write_text(f'{words} and a sign that says "OPEN"', "utf-8")
        if work.frames is None:
            picture.save(name.with_suffix(".png"))
            continue
        with av.open(str(name.with_suffix(".mp4")), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = work.width, work.height, "yuv420p"
            for frame in range(work.frames):
                moved = np.roll(np.asarray(picture), frame * 4, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, "rgb24")))
            container.mux(stream.encode(None))
    scratch.replace(folder)
