"""The version of a musubi-tuner, and whether its caches are those of the pinned one.

Reads files only: musubi-tuner is not imported, and git is not run.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
# What its trainer runs besides.
_TRAINING = (
    *("hv_1_5_train_network.py", "hv_train_network.py", "training/*.py", "modules/*.py"),
    *("networks/*.py", "hunyuan_model/*.py", "utils/*.py"),
)
# Of v0.3.4 (commit 30c658c), as :func:`sources_digest` gives them.
PINNED_SOURCES = "5a15f4c7d085a443"
PINNED_TRAINING = "148074ff6595f810"
_UNKNOWN = "of an unknown version"


@dataclass(frozen=True)
class FoundVersion:
    """The version of a musubi-tuner that is not the runner's own install.

    Attributes:
        text: in words, for records.
        own_encoding: the id that keeps its cache entries apart; None if they are those of the
            pinned version.
        notice: says that it is not the version this runner is made for; None if it is.
    """

    text: str
    own_encoding: str | None = None
    notice: str | None = None


def checkout_version(source: Path, option: str = "engine.path") -> FoundVersion:
    """Read the version that a checkout declares, and compare its scripts with v0.3.4's.

    Args:
        source: the checkout.
        option: the option that names it, for the notice.
    """
    try:
        project = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))["project"]
        declared = f"v{project['version']}"
    except (OSError, ValueError, KeyError, TypeError):
        declared = _UNKNOWN
    return _compared(declared, source / "src" / "musubi_tuner", option)


def installed_version(python: Path) -> FoundVersion:
    """Read the version of the musubi-tuner that is installed for a Python; it is not started."""
    option, prefix = "engine.python", python.parent.parent
    folders = sorted(prefix.glob("lib/python3*/*-packages"))
    for package in distributions(name="musubi-tuner", path=[str(folder) for folder in folders]):
        checkout = _editable(package)
        if checkout is not None:
            return checkout_version(checkout, option)
        return _compared(
            f"v{package.version}", Path(str(package.locate_file("musubi_tuner"))), option
        )
    text = f"musubi-tuner {_UNKNOWN}"
    return FoundVersion(text, f"{text}, {python}", _notice(text, option, apart=True))


def _editable(package: Distribution) -> Path | None:
    """Return the checkout of an editable install (direct_url.json, PEP 610)."""
    try:
        origin = json.loads(package.read_text("direct_url.json") or "{}")
        if origin["dir_info"]["editable"]:
            return Path(unquote(urlsplit(origin["url"]).path))
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _compared(declared: str, package: Path, option: str) -> FoundVersion:
    text, digest = f"musubi-tuner {declared}", sources_digest(package)
    if declared == VERSION and digest == PINNED_SOURCES:
        if sources_digest(package, _TRAINING) == PINNED_TRAINING:
            return FoundVersion(text)
        text += " with changed training scripts"
        return FoundVersion(text, None, _notice(text, option, apart=False))
    own_encoding = f"{text}, {digest}"
    if declared == VERSION:
        text += " with changed cache scripts"
    return FoundVersion(text, own_encoding, _notice(text, option, apart=True))


def _notice(text: str, option: str, *, apart: bool) -> str:
    return (
        f"{option} has {text}, and this runner is made for {VERSION}: its options and results may "
        f"differ{', and its latents and captions are cached apart from the others' * apart}."
    )


def sources_digest(package: Path, patterns: tuple[str, ...] = _CACHING) -> str:
    """Return the digest of source files, by default of those that encode latents and captions."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in package.glob(pattern)}):
        # Git may check files out with either end of line.
        text = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(package).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]
