"""How frames of a clip become latent frames: counts of the form 4N+1; pure."""

from __future__ import annotations

# The VAE joins four frames in one latent frame, after a first frame of its own.
_STRIDE = 4


def latent_frames(frames: int) -> int:
    """Latent frames that the VAE makes of ``frames`` frames: of 4N+1, N+1."""
    return (frames - 1) // _STRIDE + 1


def valid_frames(frames: int) -> int:
    """The largest 4N+1 that is not above ``frames``, which is at least 1."""
    return (frames - 1) // _STRIDE * _STRIDE + 1


def nearest_frames(frames: int) -> tuple[int, int]:
    """The two counts of the form 4N+1 around ``frames``."""
    below = max(1, valid_frames(frames))
    return below, below + _STRIDE
