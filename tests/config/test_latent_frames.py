"""How frames become latent frames."""

from __future__ import annotations

from runner.config.latent_frames import latent_frames, nearest_frames, valid_frames


# One latent frame for the first frame, one for each four after it.
def test_latent_frames() -> None:
    assert [latent_frames(frames) for frames in (1, 5, 25, 129)] == [1, 2, 7, 33]


# A count that is not 4N+1 lies between two that are, and is cut down to the lower.
def test_neighbours() -> None:
    assert [valid_frames(frames) for frames in (1, 4, 5, 24)] == [1, 1, 5, 21]
    assert nearest_frames(24) == (21, 25)
    assert nearest_frames(0) == nearest_frames(-9) == (1, 5)
