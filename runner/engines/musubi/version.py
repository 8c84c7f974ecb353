"""The version of a musubi-tuner checkout, and whether its caches are those of the pinned one.

Reads files only: musubi-tuner is not imported, and git is not run.
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from runner.engines.musubi.packages import VERSION

# What its two cache scripts run for this model, in ``src/musubi_tuner``.
_CACHING = (
    *("hv_1_5_cache_latents.py", "cache_latents.py"),
    *("hv_1_5_cache_text_encoder_outputs.py", "cache_text_encoder_outputs.py"),
    *("dataset/*.py", "hunyuan_video_1_5/*.py"),
    *("frame_pack/clip_vision.py", "frame_pack/framepack_utils.py"),
    *("qwen_image/qwen_image_autoencoder_kl.py", "qwen_image/qwen_image_utils.py"),
    *("utils/model_utils.py", "utils/safetensors_utils.py"),
)
# Of v0.3.4 (commit 30c658c), as :func:`sources_digest` gives it.
PINNED_SOURCES = "5a15f4c7d085a443"


@dataclass(frozen=True)
class CheckoutVersion:
    """The version of a checkout.

    Attributes:
        text: in words, for records.
        own_encoding: the id that keeps its cache entries apart; None if they are those of the
            pinned version.
    """

    text: str
    own_encoding: str | None

    @property
    def notice(self) -> str | None:
        """Say that it is not the version this runner is made for, or None if it is."""
        if self.own_encoding is None:
            return None
        return (
            f"engine.path has {self.text}, and this runner is made for {VERSION}: its options and "
            "results may differ, and its latents and captions are cached apart from the others."
        )


def checkout_version(source: Path) -> CheckoutVersion:
    """Read the version that a checkout declares, and compare its cache scripts with v0.3.4's."""
    try:
        project = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))["project"]
        declared = f"v{project['version']}"
    except (OSError, ValueError, KeyError, TypeError):
        declared = "of an unknown version"
    digest = sources_digest(source / "src" / "musubi_tuner")
    if declared == VERSION and digest == PINNED_SOURCES:
        return CheckoutVersion(f"musubi-tuner {VERSION}", None)
    text = f"musubi-tuner {declared}"
    if declared == VERSION:
        text += " with changed cache scripts"
    return CheckoutVersion(text, f"musubi-tuner {declared}, {digest}")


def sources_digest(package: Path) -> str:
    """Return the digest of the source files that encode latents and captions."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _CACHING for file in package.glob(pattern)}):
        # Git may check files out with either end of line.
        text = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(package).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]
