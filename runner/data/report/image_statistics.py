"""Image statistics: sharpness, brightness, perceptual hash, thumbnail.

A picture is decoded as small as its format allows, and of a clip one frame near its middle, both
with their corrections. The statistics are stored under ``outputs/cache/looks`` by the media's
digest, so that other runs need
not measure again. PIL, numpy and PyAV are imported where they are used.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from runner.core.atomic import write_text
from runner.core.errors import UserError
from runner.core.file_identity import identity_of
from runner.data.corrections.clips import corrected_frame, open_clip
from runner.data.corrections.model import NO_CORRECTION, Correction
from runner.data.corrections.pictures import correct_picture, open_picture, to_rgb
from runner.data.sources.archive import Archive
from runner.data.sources.open_archive import open_archive
from runner.storage.shared_cache import json_digest

if TYPE_CHECKING:
    import numpy as np
    from av.video.frame import VideoFrame
    from PIL import Image

    from runner.data.sources import SourceMedia

# Increase when the measurement changes, so that old statistics are not used.
STATISTICS_VERSION = 1

# Pixels of the longer side at which media are measured; smaller ones are not enlarged. This is
# about the size of training, so that detail lost in shrinking does not count as sharpness.
SIDE = 512
THUMBNAIL = 160

# Media with a lower sharpness are called blurred. The sample's pictures have 700 to 2900; blurred
# by 1 pixel of the 512 they have 44 to 175, by 1.5 pixels 13 to 49 (tests/data/test_report.py).
BLURRED = 100.0
DARK = 16.0  # mean brightness, of 255
FLAT = 4.0  # standard deviation of brightness, of 255

_TILES = 4
_IN_MEMORY = 64 << 20
# Frames to skip after a key frame that is dark or flat (a fade) before measuring another.
_FRAMES_ON = 48


@dataclass(frozen=True)
class ImageStatistics:
    """Image statistics of one picture or clip.

    Attributes:
        sharpness: variance of the Laplacian in the sharpest of 16 tiles, so that a sharp subject
            before a soft background counts as sharp.
        brightness, contrast: mean and standard deviation, 0 to 255.
        hash: 128 bits, the signs of the differences between neighbouring pixels in a tiny copy,
            across and down.
        thumbnail: a JPEG, base64.
        stored: a thumbnail of the pixels as they are stored, if they are displayed otherwise.
    """

    sharpness: float
    brightness: float
    contrast: float
    hash: int
    thumbnail: str
    stored: str = ""

    @property
    def dark(self) -> bool:
        """Whether it is nearly black."""
        return self.brightness < DARK and not self.flat

    @property
    def flat(self) -> bool:
        """Whether it is one flat colour."""
        return self.contrast < FLAT

    @property
    def blurred(self) -> bool:
        """Whether it is blurred, and not dark or flat."""
        return self.sharpness < BLURRED and not self.flat and not self.dark

    @property
    def fine(self) -> bool:
        """Whether it is neither dark nor flat nor blurred."""
        return not (self.dark or self.flat or self.blurred)


def measure_all(
    media: Iterable[tuple[SourceMedia, Correction]],
    folder: Path,
    *,
    keep: bool,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ImageStatistics]:
    """Measure media, or read statistics measured before.

    Args:
        media: the media, and their corrections: they are measured as they are trained on.
        folder: the folder of stored statistics.
        keep: whether to store new statistics there.
        progress: called with the numbers of media measured and to measure.

    Returns:
        The statistics by :func:`statistics_key`, without media that can't be read.
    """
    wanted = {statistics_key(*one): one for one in media}
    known = {key: _recorded(folder, key) for key in wanted}
    image_statistics = {key: found for key, found in known.items() if found is not None}
    missing = [key for key in wanted if key not in image_statistics]
    with ExitStack() as stack:
        archives: dict[Path, Archive] = {}
        for item in (wanted[key][0] for key in missing):
            if item.archive is not None and item.archive not in archives:
                with suppress(UserError):  # Deleted since the scan: its media have no statistics.
                    archives[item.archive] = stack.enter_context(open_archive(item.archive))
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            futures = {pool.submit(_measure_media, *wanted[key], archives): key for key in missing}
            for done, future in enumerate(as_completed(futures), 1):
                statistics = future.result()
                if statistics is not None:
                    key = futures[future]
                    image_statistics[key] = statistics
                    if keep:
                        # Not synced: a truncated file is not valid JSON and is made again.
                        write_text(
                            _statistics_path(folder, key),
                            json.dumps(asdict(statistics)),
                            sync=False,
                        )
                if progress is not None:
                    progress(done, len(missing))
        finally:
            pool.shutdown(cancel_futures=True)
    return image_statistics


def statistics_key(item: SourceMedia, correction: Correction) -> str:
    """Return the key of the statistics of media with this correction."""
    inputs: dict[str, Any] = {"media": item.sha256, "look": STATISTICS_VERSION}
    changed = correction.cache_inputs(copy=False) if correction.changes else None
    return json_digest(inputs if changed is None else {**inputs, "correction": changed})


def _statistics_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.json"


def _recorded(folder: Path, key: str) -> ImageStatistics | None:
    try:
        record: Any = json.loads(_statistics_path(folder, key).read_text("utf-8"))
        return ImageStatistics(
            sharpness=float(record["sharpness"]),
            brightness=float(record["brightness"]),
            contrast=float(record["contrast"]),
            hash=int(record["hash"]),
            thumbnail=str(record["thumbnail"]),
            stored=str(record.get("stored", "")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure_media(
    item: SourceMedia, correction: Correction, archives: Mapping[Path, Archive]
) -> ImageStatistics | None:
    try:
        with _opened(item, archives) as stream:
            if item.media_kind == "image":
                data = stream.read()
                same = hashlib.sha256(data).hexdigest() == item.sha256
                return measure_picture(io.BytesIO(data), correction) if same else None
            if item.file is not None:
                same = item.identity in (None, identity_of(os.fstat(stream.fileno())))
                return measure_clip(item.file, correction) if same else None
            digest = hashlib.sha256()
            with cast(BinaryIO, SpooledTemporaryFile(_IN_MEMORY)) as spool:
                while data := stream.read(1 << 20):
                    digest.update(data)
                    spool.write(data)
                same = digest.hexdigest() == item.sha256
                return measure_clip(spool, correction) if same else None
    except Exception:
        # Decoders raise all kinds of errors, and a report must not stop a run. Media without
        # statistics are named in it.
        return None


def _opened(item: SourceMedia, archives: Mapping[Path, Archive]) -> BinaryIO:
    if item.file is not None:
        return item.file.open("rb")
    assert item.archive is not None
    assert item.member is not None
    return archives[item.archive].open(item.member)


def measure_picture(stream: BinaryIO, correction: Correction = NO_CORRECTION) -> ImageStatistics:
    """Measure a picture as corrected; the decoder's error is raised if it is damaged."""
    with open_picture(stream) as image:
        ratio = SIDE / max(image.size)
        # A JPEG can be decoded at a half, a quarter or an eighth, which saves most of the work.
        image.draft(None, (int(image.width * ratio), int(image.height * ratio)))
        image.load()
        statistics = measure(correct_picture(image, correction))
        if not correction.looks_different:
            return statistics
        return replace(statistics, stored=_thumbnail(to_rgb(image)))


def measure_clip(
    source: Path | BinaryIO, correction: Correction = NO_CORRECTION
) -> ImageStatistics:
    """Measure the key frame before a clip's middle, or a later frame if that one is not fine."""
    with open_clip(source) as container:
        stream = container.streams.video[correction.stream]
        if stream.duration:
            container.seek((stream.start_time or 0) + stream.duration // 2, stream=stream)
        frames = container.decode(stream)
        statistics = _measure_frame(next(frames), correction)
        if statistics.fine:
            return statistics
        later = None
        for number, frame in enumerate(frames, 1):
            later = frame
            if number == _FRAMES_ON:
                break
        second = statistics if later is None else _measure_frame(later, correction)
        return max(statistics, second, key=lambda one: (one.fine, one.sharpness))


def _measure_frame(frame: VideoFrame, correction: Correction) -> ImageStatistics:
    from PIL import Image

    if not correction.looks_different:
        return measure(frame.to_image())
    statistics = measure(Image.fromarray(corrected_frame(frame, correction)))
    return replace(statistics, stored=_thumbnail(frame.to_image()))


def measure(image: Image.Image) -> ImageStatistics:
    """Measure an RGB picture."""
    import numpy as np
    from PIL import Image

    light = _shrunk(image.convert("L"), SIDE)
    grey = np.asarray(light)
    across = np.asarray(light.resize((9, 8), Image.Resampling.BOX), np.int16)
    down = np.asarray(light.resize((8, 9), Image.Resampling.BOX), np.int16)
    signs = np.concatenate([(np.diff(across) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()])
    return ImageStatistics(
        sharpness=round(_sharpness(grey), 2),
        brightness=round(float(grey.mean()), 2),
        contrast=round(float(grey.std()), 2),
        hash=int.from_bytes(np.packbits(signs).tobytes()),
        thumbnail=_thumbnail(image),
    )


def _thumbnail(image: Image.Image) -> str:
    """Return a small JPEG, base64."""
    out = io.BytesIO()
    _shrunk(image, THUMBNAIL, 1.0).save(out, "JPEG", quality=65)
    return base64.b64encode(out.getvalue()).decode()


def _shrunk(image: Image.Image, side: int, gap: float = 2.0) -> Image.Image:
    from PIL import Image

    share = side / max(image.size)
    if share >= 1:
        return image
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=gap)


def _sharpness(grey: np.ndarray) -> float:
    """Return the maximum variance of the Laplacian in a tile of ``grey`` ([H, W] uint8)."""
    import numpy as np

    if min(grey.shape) < 3:
        return 0.0
    g = grey.astype(np.float32)
    edges = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    parts = _TILES if min(edges.shape) >= _TILES else 1
    height, width = (side // parts for side in edges.shape)
    # The rest at the edges is left out, so that all tiles have one size.
    tiles = edges[: height * parts, : width * parts].reshape(parts, height, parts, width)
    squares = np.einsum("ahbw,ahbw->ab", tiles, tiles) / (height * width)
    return float((squares - tiles.mean(axis=(1, 3)) ** 2).max())
