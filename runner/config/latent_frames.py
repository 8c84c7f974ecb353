"""Frame counts of clips and of their latents (4N+1 frames give N+1 latent frames); pure."""

from __future__ import annotations

# The first frame has a latent frame of its own; each further one joins four frames.
_STRIDE = 4


def latent_frames(frames: int) -> int:
    """Count the latent frames that the VAE makes from ``frames`` frames (4N+1 give N+1)."""
    return (frames - 1) // _STRIDE + 1


def valid_frames(frames: int) -> int:
    """Return the largest 4N+1 that is not above ``frames``, which must be at least 1."""
    return (frames - 1) // _STRIDE * _STRIDE + 1


def nearest_frames(frames: int) -> tuple[int, int]:
    """Return the nearest counts of the form 4N+1 below and above ``frames``."""
    below = max(1, valid_frames(frames))
    return below, below + _STRIDE
