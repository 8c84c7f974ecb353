"""Clips are trained on as a player shows them: against what FFmpeg's command makes of the same
files (scripts/record-media-truth)."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOP
from media_factory import make_clip, make_image
from odd_media import TIMES, corners_of, number_of, odd_clip

from runner.core.errors import UserError
from runner.data.corrections.clips import corrected_frames, write_clip
from runner.data.corrections.model import Correction, clip_correction, target_rate
from runner.data.sources.probe import Properties, probe_clip
from runner.formats.frames import FrameExtraction, crops

TRUTH: dict[str, Any] = json.loads((TOP / "tests/fixtures/clips_as_seen.json").read_text())
EVERY = FrameExtraction(mode="full", max_frames=1000)


def seen(
    path: Path, fps: str = "auto", extraction: FrameExtraction = EVERY
) -> tuple[Properties, Correction, np.ndarray]:
    """A clip's properties and correction, and the frames [F, H, W, 3] that are trained on."""
    found = probe_clip(path)
    correction = clip_correction(
        found.size,
        found.frames,
        found.fps,
        found.display,
        extraction,
        target=target_rate(fps, extraction.source_fps),
        background="#ffffff",
    )
    frames = correction.frames or tuple(range(found.frames))
    changed = Correction(**{**vars(correction), "frames": frames})
    images = np.stack(list(corrected_frames(path, changed)))
    assert images.shape[2:0:-1] == found.size
    return found, correction, images


# Rotation and mirroring are applied, all eight.
@pytest.mark.parametrize("orientation", range(1, 9))
def test_clips_are_turned(orientation: int, tmp_path: Path) -> None:
    truth = TRUTH["turned"][str(orientation)]
    _, correction, frames = seen(odd_clip(tmp_path / "a.mp4", orientation=orientation))
    assert bool(correction) == (orientation != 1)
    assert list(frames.shape) == truth["shape"]
    assert np.abs(np.array(corners_of(frames[0])) - truth["corners"]).max() <= 2


# Pixels that are not square are made square; a rotation comes after that.
@pytest.mark.parametrize("aspect", TRUTH["square"])
def test_pixels_become_square(aspect: str, tmp_path: Path) -> None:
    path = odd_clip(tmp_path / "a.mp4", aspect=Fraction(aspect))
    assert list(seen(path)[2].shape) == TRUTH["square"][aspect]
    turned = odd_clip(tmp_path / "b.mp4", aspect=Fraction(aspect), orientation=6)
    frames, height, width, channels = TRUTH["square"][aspect]
    assert list(seen(turned)[2].shape) == [frames, width, height, channels]


# A clip faster than 24 frames per second is brought to it, one of a variable rate goes by its time
# stamps; all others keep their frames, and need no correction.
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", TIMES)
def test_clips_play_at_their_speed(name: str, suffix: str, tmp_path: Path) -> None:
    found, correction, frames = seen(odd_clip(tmp_path / f"a{suffix}", TIMES[name]))
    truth = TRUTH["times"][name + suffix]
    shown = [number_of(frame) for frame in frames]
    # How long the last frame is shown is not stored, so that one more or less may be shown.
    assert shown[: len(truth) - 1] == truth[: len(shown)][: len(truth) - 1]
    assert abs(len(shown) - len(truth)) <= 1
    assert bool(correction) == (name not in ("24", "16"))
    assert bool(found.display.times) == (name in ("phone", "uneven", "pause"))
    if name in ("24", "16", "25", "50", "60"):
        assert found.fps == pytest.approx(float(name), rel=1e-3)


# HDR is tone-mapped as FFmpeg's usual chain does it at the clip's own peak: to 2 of 255 on average,
# and 10 anywhere (zscale and swscale round differently). Pure colours of BT.2020, rows 1 to 3, lie
# outside BT.709: they are cut off here, and by the chain's step through YUV.
@pytest.mark.parametrize("case", TRUTH["hdr"])
def test_hdr_is_tone_mapped(case: str, tmp_path: Path) -> None:
    transfer, peak = case.split()
    path = odd_clip(tmp_path / "a.mp4", transfer=transfer, peak=int(peak))
    found, _, frames = seen(path)
    assert (found.display.transfer, found.display.peak) == (transfer, float(peak))
    difference = np.abs(frames[0][4::8, 4::8].astype(int) - TRUTH["hdr"][case])
    assert difference.mean() <= 2
    assert difference[[0, 4, 5]].max() <= 10


# Without a stated peak, 1,000 cd/m2 are assumed.
def test_a_peak_is_assumed(tmp_path: Path) -> None:
    assert probe_clip(odd_clip(tmp_path / "a.mp4", transfer="pq")).display.peak == 1000.0


# dataset.fps: native keeps every frame, a number is another rate; source_fps set wins over both.
def test_the_rate_can_be_set(tmp_path: Path) -> None:
    path = odd_clip(tmp_path / "a.mp4", TIMES["60"])
    assert not seen(path, "native")[1]
    _, correction, frames = seen(path, "12")
    assert correction.rate == 12
    assert [number_of(frame) for frame in frames] == list(range(2, 61, 5))
    assert not seen(path, "auto", FrameExtraction(mode="full", source_fps=60.0))[1]


# The copy holds the frames that crops need and no more; crops are those of the whole clip.
@pytest.mark.parametrize(
    ("extraction", "frames"),
    [
        (FrameExtraction((1, 5, 9)), 9),
        (FrameExtraction((5,), mode="full", max_frames=13), 13),
        (FrameExtraction((5,), mode="chunk"), 24),
    ],
)
def test_the_copy_has_what_is_used(
    extraction: FrameExtraction, frames: int, tmp_path: Path
) -> None:
    path = odd_clip(tmp_path / "a.mp4", TIMES["60"])
    _, correction, images = seen(path, extraction=extraction)
    assert len(images) == frames
    assert crops(frames, extraction) == crops(24, extraction)
    copies = [correction.cache_inputs(copy=copy) for copy in (True, False)]
    assert copies[0] == {**copies[1], "frames": frames}


# The copy is without loss, and the same each time.
def test_the_copy_is_exact(tmp_path: Path) -> None:
    import av

    path = odd_clip(tmp_path / "a.mp4", TIMES["60"], orientation=6)
    _, correction, images = seen(path)
    written = []
    for _ in range(2):
        parts: list[bytes] = []
        write_clip(path, correction, parts.append)
        written.append(b"".join(parts))
    assert written[0] == written[1]
    with av.open(io.BytesIO(written[0]), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate or 0) == 24
    assert np.array_equal(frames, images)


# A cover picture beside the clip, sound and other streams are not the clip.
def test_other_streams_do_not_confuse(tmp_path: Path) -> None:
    import av
    from av.stream import Disposition

    plain = make_clip(tmp_path / "plain.mp4", 9)
    path = tmp_path / "covered.mp4"
    cover = make_image(tmp_path / "cover.png", (32, 32)).read_bytes()
    with av.open(str(plain)) as source, av.open(str(path), "w") as out:
        pictures = out.add_stream("png", rate=1)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "rgb24"
        pictures.disposition = Disposition.attached_pic
        stream = out.add_stream_from_template(source.streams.video[0])
        sound: Any = out.add_stream("aac", rate=44100)
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.time_base = pictures, 0, 0, Fraction(1)
        out.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        out.mux(sound.encode(silence))
        for part in source.demux(video=0):
            if part.dts is not None:
                part.stream = stream
                out.mux(part)
        out.mux(sound.encode())
    found, _, frames = seen(path)
    assert (found.size, found.frames) == ((64, 48), 9)
    assert np.array_equal(frames, seen(plain)[2])


# A cover picture alone, as music has it, is no clip.
def test_a_cover_is_no_clip(tmp_path: Path) -> None:
    import av
    from av.stream import Disposition

    path = tmp_path / "song.mp4"
    cover = make_image(tmp_path / "cover.png", (32, 32)).read_bytes()
    with av.open(str(path), "w") as out:
        pictures = out.add_stream("png", rate=1)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "rgb24"
        pictures.disposition = Disposition.attached_pic
        sound: Any = out.add_stream("aac", rate=44100)
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.time_base = pictures, 0, 0, Fraction(1)
        out.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        out.mux(sound.encode(silence))
        out.mux(sound.encode())
    with pytest.raises(UserError, match="it has no video stream"):
        probe_clip(path)


# Transparency of a clip is blended as that of a picture is.
def test_transparent_clips_are_blended(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgra"
        image = np.full((48, 64, 4), (200, 0, 0, 0), np.uint8)
        image[24:, :, 3] = 255
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgba")))
        out.mux(stream.encode())
    _, correction, frames = seen(path)
    assert correction.background == "#ffffff"
    assert frames[1][5, 5].tolist() == [255, 255, 255]
    assert frames[1][40, 5].tolist() == [200, 0, 0]


# A clip that starts late and one whose sound is longer are not cut; a clip that can only be decoded
# in part is left out, with how much of it is left.
def test_what_only_seems_cut(tmp_path: Path) -> None:
    late = odd_clip(tmp_path / "late.mkv", [time + 5 for time in TIMES["24"]])
    assert probe_clip(late).display.frames_stated is None
    long_sound = tmp_path / "sound.mkv"
    import av

    with (
        av.open(str(make_clip(tmp_path / "a.mp4", 24))) as source,
        av.open(str(long_sound), "w") as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        sound: Any = out.add_stream("aac", rate=44100)
        for number in range(130):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, number * 1024
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
        for part in source.demux(video=0):
            if part.dts is not None:
                part.stream = stream
                out.mux(part)
    found = probe_clip(long_sound)
    assert (found.frames, found.display.frames_stated) == (24, None)
    whole = odd_clip(tmp_path / "b.mp4", TIMES["24"])
    cut = tmp_path / "cut.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(cut), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for part in source.demux(video=0):
            if part.dts is not None:
                part.stream = stream
                out.mux(part)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    with pytest.raises(UserError, match=r"it is damaged or cut short after \d+ frames \("):
        probe_clip(cut)


# A pause does not slow down the rest: the usual step between frames counts, not the average.
def test_a_pause_keeps_the_rate(tmp_path: Path) -> None:
    times = [n / 24 for n in range(20)] + [10 + n / 24 for n in range(20)]
    _, correction, frames = seen(odd_clip(tmp_path / "a.mp4", times))
    assert correction.rate == pytest.approx(24, rel=1e-3)
    assert [number_of(frame) for frame in frames[:20]] == list(range(20))
    assert {number_of(frame) for frame in frames[20:239]} == {19}
    assert number_of(frames[-1]) == 39


# Interlaced clips are known, and those of which an end is missing.
def test_interlaced_and_cut_clips_are_known(tmp_path: Path) -> None:
    assert probe_clip(odd_clip(tmp_path / "a.mp4", interlaced=True)).display.interlaced
    whole = odd_clip(tmp_path / "b.mkv", TIMES["24"])
    assert probe_clip(whole).display.frames_stated is None
    cut = tmp_path / "c.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = probe_clip(cut)
    assert 5 <= found.frames <= 25
    assert found.display.frames_stated is not None and 28 <= found.display.frames_stated <= 31
