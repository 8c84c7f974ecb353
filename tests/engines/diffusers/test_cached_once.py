"""Only missing items are encoded: the calls of the real encoders, on a hundred small media."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cache_process import context_of, prepare
from in_process import executables_here
from media_factory import make_clip
from other_processes import pictures

from runner.core.console import Console

CLIPS = 4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Runs the embedded engine's cache commands in this process and counts what is encoded.

    The commands' own arguments and files are used, in the run's folder. One process is enough for
    all of them, since importing torch takes far longer than encoding.
    """
    import torch

    from runner.engines.diffusers import cache_latents, cache_text

    torch.set_num_threads(1)
    # Hundreds of syncs take longer than all the encoding, and nothing here is about power cuts.
    monkeypatch.setattr("os.fsync", lambda _: None)
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str, what: str, number: Any) -> None:
        real = getattr(module, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            counts[what] += number(*arguments)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, wrapped)

    counted(cache_latents, "encode_frames", "latents", lambda _vae, _frames: 1)
    # For i2v the first frame is encoded a second time, by itself, as its condition.
    counted(cache_latents, "first_frame_condition", "latents", lambda *_: -1)
    counted(cache_text, "encode_captions", "captions", lambda _t, _e, captions: len(captions))
    executables_here(monkeypatch)
    return counts


# With 100 media, adding 5 encodes 5 latents and 5 captions; changing one caption encodes one
# caption and no latent; the trigger word captions only; resolution, frames or task latents only.
def test_only_missing_items_are_encoded(tmp_path: Path, calls: Counter[str]) -> None:
    from runner.engines.diffusers.make_weights import make_weights
    from runner.engines.diffusers.weights import TINY_VERSION

    media, out = pictures(tmp_path / "media", 100 - CLIPS), tmp_path / "out"
    for number in range(CLIPS):
        # Of 25 frames, from which crops of 1, 13 and 25 frames are taken.
        clip = make_clip(media / f"c{number}.mp4", 25 + number)
        clip.with_suffix(".txt").write_text(f"clip {number}")
    make_weights(out / "cache" / "weights" / f"tiny-{TINY_VERSION}")

    def encoded(*overrides: str) -> dict[str, int]:
        calls.clear()
        silent = Console.for_stream(io.StringIO())
        context = context_of(out, media, "engine=diffusers", *overrides, console=silent)
        prepare(context)
        stages = [context.plan.stage(name) for name in ("latents", "text")]
        places = {place for s in stages for entry in s.entries for place in entry.links}
        assert all((context.run_dir / place).exists() for place in places)
        return {what: calls[what] for what in ("latents", "captions")}

    pictures_ = 100 - CLIPS
    assert encoded() == {"latents": pictures_ + 3 * CLIPS, "captions": 100}
    nothing = {"latents": 0, "captions": 0}
    assert encoded() == nothing
    assert encoded("network.rank=8", "training.epochs=3", "optimizer=adafactor") == nothing
    (media / "p000.txt").write_text("the caption is another")
    assert encoded() == {"latents": 0, "captions": 1}
    pictures(media, 5, first=200)
    assert encoded() == {"latents": 5, "captions": 5}
    assert encoded("dataset.trigger_word=ohwx") == {"latents": 0, "captions": 105}
    everything = {"latents": pictures_ + 5 + 3 * CLIPS, "captions": 0}
    assert encoded("dataset.resolution=[32,32]") == everything
    # Crops of 5 frames are new, those of 13 are there.
    assert encoded("dataset.target_frames=[5,13]") == {"latents": CLIPS, "captions": 0}
    # Pictures are left out of image to video, and so are the crops of one frame.
    assert encoded("task=i2v") == {"latents": 2 * CLIPS, "captions": 0}
    assert encoded("task=i2v") == encoded() == nothing
