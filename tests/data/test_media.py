"""Decoding and resizing. Equality with musubi itself is in test_musubi_dataset.py."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from media_factory import CODECS, frame_number, make_clip, make_image, make_sound, pattern

from runner.core.errors import UserError
from runner.data.decode import load_clip, load_image, resize_to_bucket
from runner.data.sources.probe import probe_clip
from runner.formats.frames import FrameExtraction
from runner.formats.media_types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


# Every kind of picture that is accepted by name can be read, in any mode, as RGB.
@pytest.mark.parametrize("extension", sorted({*IMAGE_EXTENSIONS} - {".heic", ".heif"}))
def test_pictures_are_read_as_rgb(tmp_path: Path, extension: str) -> None:
    image = load_image(make_image(tmp_path / f"a{extension}"))
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - pattern((64, 48))).mean() < 40


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    file = tmp_path / "a.png"
    if mode == "I;16":
        Image.fromarray(np.zeros((48, 64), np.uint16)).save(file)
    else:
        make_image(file, mode=mode)
    assert load_image(io.BytesIO(file.read_bytes())).shape == (48, 64, 3)


# Turned by EXIF only, a picture is trained as it is stored: musubi takes no notice of the tag.
def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(pattern((64, 48)))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (48, 64, 3)


# Every kind of clip that is accepted by name decodes, frame for frame, and is counted right.
@pytest.mark.parametrize("extension", VIDEO_EXTENSIONS)
def test_clips_are_read_frame_for_frame(
    tmp_path: Path, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extension in CODECS
    # A colon and brackets in a name mean nothing to the decoder.
    path = Path(f"http:[1] é{extension}")
    make_clip(tmp_path / path, 30, fps=30.0)
    monkeypatch.chdir(tmp_path)
    clip = load_clip(path, FrameExtraction(mode="full"), (128, 96))
    assert clip.shape == (30, 96, 128, 3) and clip.dtype == np.uint8
    assert [frame_number(frame) for frame in clip] == list(range(30))
    found = probe_clip(path)
    assert (found.size, found.frames, found.fps) == ((64, 48), 30, 30.0)
    with path.open("rb") as stream:
        found = probe_clip(stream)
        assert (found.size, found.frames, found.fps) == ((64, 48), 30, 30.0)


# Scaling covers the bucket and cuts the middle out: the centre stays, both sides lose the same.
def test_resizing_cuts_the_middle_out() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 140:160] = 255
    for size in [(64, 64), (256, 256), (96, 48)]:
        small = resize_to_bucket(image, size)
        assert small.shape == (size[1], size[0], 3)
        columns = np.nonzero(small[:, :, 0].mean(axis=0) > 128)[0]
        assert abs((columns[0] + columns[-1] + 1) / 2 - size[0] / 2) <= 1
    assert resize_to_bucket(image, (300, 100)) is image


# What can't be decoded is one line that names the file.
def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.png can't be read"):
        load_image(tmp_path / "bad.png")
    whole = make_image(tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.png can't be read"):
        load_image(tmp_path / "cut.png")
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    with pytest.raises(UserError, match=r"bad\.mp4 can't be decoded"):
        load_clip(tmp_path / "bad.mp4", FrameExtraction(), (64, 64))
    with pytest.raises(UserError, match=r"sound\.mp4 .* no video stream"):
        load_clip(make_sound(tmp_path / "sound.mp4"), FrameExtraction(), (64, 64))


# The plan imports these modules: they must not bring the decoders or numpy along.
def test_import_is_light() -> None:
    code = (
        "import sys, runner.data.sources, runner.data.decode, runner.formats.dataset_toml\n"
        "print([m for m in ('numpy', 'torch', 'PIL', 'av', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
