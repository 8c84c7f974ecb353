"""What a scan finds out without decoding everything, against decoding everything."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_factory import make_clip, make_image, pattern

from runner.data.sources import probe
from runner.data.sources.probe import probe_clip, probe_picture


def clip(
    path: Path,
    frames: int,
    codec: str = "libx264",
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """A clip with the encoder's own options, made of moving detail."""
    import av

    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=Fraction(24))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"preset": "ultrafast", **options}
        base = pattern((96, 64))
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(base, number, 1), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def outcome(look: Callable[[Any], Any], source: Any) -> Any:
    """What `look` gives, or that it raises."""
    try:
        return look(source)
    except Exception:
        return "unreadable"


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("a.mp4", 50, {}),
    "one frame": ("a.mp4", 1, {}),
    "b-frames": ("a.mp4", 50, {"preset": "medium", "bf": "8", "b_strategy": "0"}),
    "open gop": (
        "a.mkv",
        60,
        {"preset": "medium", "g": "12", "x264-params": "open-gop=1:bframes=3"},
    ),
    "interlaced": ("a.mp4", 30, {"flags": "+ildct+ilme", "x264-params": "tff=1"}),
    "mov": ("a.mov", 30, {}),
    "fragments": ("a.mp4", 60, {"container": {"movflags": "frag_keyframe+empty_moov"}, "g": "10"}),
    "head first": ("a.mp4", 40, {"container": {"movflags": "faststart"}}),
    "hevc": (
        "a.mp4",
        40,
        {"codec": "libx265", "x265-params": "log-level=none:open-gop=1:keyint=10"},
    ),
    "hevc mkv": ("a.mkv", 40, {"codec": "libx265", "x265-params": "log-level=none"}),
    "avi": ("a.avi", 40, {}),
    "vp9 hidden frames": ("a.webm", 40, {"codec": "libvpx-vp9", "auto-alt-ref": "1", "b": "50k"}),
    "vp8 hidden frames": (
        "a.webm",
        60,
        {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "50k"},
    ),
}


# Size, frames and rate are those that decoding gives: in every container, with frames that lean on
# later ones, hidden frames and fields, also where the file ends too early anywhere.
@pytest.mark.parametrize("case", CASES)
def test_frames_are_counted_as_decoded(case: str, tmp_path: Path) -> None:
    name, frames, options = CASES[case]
    path = clip(tmp_path / name, frames, **options)
    assert probe_clip(path) == probe._decoded(path)
    assert probe_clip(path).frames == frames
    data, stream = path.read_bytes(), random.Random(case)
    cut = tmp_path / f"cut{path.suffix}"
    for _ in range(12):
        cut.write_bytes(data[: stream.randrange(len(data))])
        assert outcome(probe_clip, cut) == outcome(probe._decoded, cut)


# So also for a clip cut out of another without encoding it anew: it begins between key frames, at
# one that later frames are shown before, or shows less than it holds (`shown` is its first frame).
@pytest.mark.parametrize("start", [1, 7, 20, "key"])
@pytest.mark.parametrize("shown", [0, 5])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_clips_that_begin_in_the_middle(
    start: int | str, shown: int, suffix: str, tmp_path: Path
) -> None:
    import av

    options = {"preset": "medium", "g": "12", "x264-params": "open-gop=1:bframes=3"}
    whole = clip(tmp_path / "whole.mp4", 48, **options)  # type: ignore[arg-type]
    path = tmp_path / f"part{suffix}"
    with av.open(str(whole)) as source:
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        packets = packets[keys[1] if start == "key" else int(start) :]
        step = min(packet.duration or 1 for packet in packets)
        zero = min(packet.pts or 0 for packet in packets) + shown * step
        keep = {"avoid_negative_ts": "disabled"}
        with av.open(str(path), "w", options=keep if suffix == ".mp4" else {}) as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in packets:
                packet.pts, packet.dts = (packet.pts or 0) - zero, (packet.dts or 0) - zero
                packet.stream = stream
                out.mux(packet)
    assert outcome(probe_clip, path) == outcome(probe._decoded, path)


# A clip whose frames are as far apart as one missing would leave them is decoded to be sure.
def test_gaps_are_looked_into() -> None:
    assert probe._even([0, 3, 1, 2, 4])
    assert probe._even([0, 41, 83, 125, 166])
    assert not probe._even([0, 1, 2, 4, 5])
    assert not probe._even([0, 1, 1, 2, 3])


# Damage in the middle that a decoder stumbles over is not counted on.
def test_zeroed_packets_are_decoded(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 60)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    assert outcome(probe_clip, path) == outcome(probe._decoded, path)


# The quick way is taken where it should be: decoding every frame of a set takes minutes.
def test_common_clips_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [clip(tmp_path / f"a{suffix}", 30) for suffix in (".mp4", ".mov", ".mkv")]
    paths.append(clip(tmp_path / "b.mp4", 30, preset="medium", bf="3"))

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(probe, "_decoded", never)
    assert [probe_clip(path).frames for path in paths] == [30] * 4


def fully(data: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.size


# A picture is readable where decoding all of it succeeds: whole, cut anywhere, or with bytes after
# its end.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.jpg", {"mode": "L"}),
        ("a.jpg", {"mode": "CMYK"}),
        ("a.png", {}),
        ("a.png", {"mode": "RGBA"}),
        ("a.png", {"mode": "P"}),
        ("a.webp", {}),
        ("a.bmp", {}),
    ],
)
def test_pictures_are_judged_as_decoding_does(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from PIL import Image

    mode = options.pop("mode", "RGB")
    path = tmp_path / name
    Image.fromarray(pattern((300, 200))).convert(mode).save(path, **options)
    data = path.read_bytes()
    with Image.open(path) as image:
        found = probe_picture(io.BytesIO(data))
        assert (found.size, found.mode) == ((300, 200), image.mode)
    stream = random.Random(name)
    broken = [data[: stream.randrange(len(data))] for _ in range(60)]
    broken += [data[:-1], data[:-2], data + b"\0" * 9, data + b"later\xff\xd9"]
    for cut in broken:
        # Some damage after the last pixel is nobody's loss, and either answer will do.
        quick = outcome(lambda d: probe_picture(io.BytesIO(d)).size, cut)
        assert quick == outcome(fully, cut), len(cut)


# Damaged tables of a JPEG are seen, though its end is there.
def test_damaged_headers_are_seen(tmp_path: Path) -> None:
    data = make_image(tmp_path / "a.jpg", (300, 200)).read_bytes()
    stream, seen = random.Random(5), 0
    start = data.index(b"\xff\xda")
    for _ in range(300):
        broken = bytearray(data)
        at = stream.randrange(2, start)
        broken[at] ^= 1 << stream.randrange(8)
        full = outcome(fully, bytes(broken))
        seen += full == "unreadable"
        assert outcome(lambda d: probe_picture(io.BytesIO(d)).size, bytes(broken)) == full, at
    assert seen > 10


# A whole photo is not decoded.
def test_common_pictures_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    file = make_image(tmp_path / "a.jpg", (900, 700))
    sizes: list[tuple[int, int]] = []
    load = Image.Image.load

    def noted(self: Any) -> Any:
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", noted)
    assert probe_picture(io.BytesIO(file.read_bytes())).size == (900, 700)
    assert sizes == [(900, 16)]


# A clip made by the other tests' factory, for the sake of its variable name.
def test_lossless_clips_are_decoded(tmp_path: Path) -> None:
    found = probe_clip(make_clip(tmp_path / "a.mkv", 9))
    assert (found.size, found.frames, found.fps) == ((64, 48), 9, 24.0)
