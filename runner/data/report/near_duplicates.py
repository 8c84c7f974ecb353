"""Find near duplicates by their perceptual hashes; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Media whose hashes differ in at most this many of 128 bits are near duplicates. The sample's
# pictures differ in 0 to 4 from copies of another size, brightness or quality,
# and in 57 and up from each other; a crop of 2% differs in 4 to 20 (tests/data/test_report.py).
NEAR = 10


def groups(hashes: Sequence[int]) -> list[tuple[int, ...]]:
    """Group near-duplicate hashes, transitively.

    Returns:
        Sorted tuples of indices, each with at least two.
    """
    import numpy as np

    words = _words(hashes)
    labels = np.arange(len(words))
    for index in range(len(words)):
        near = np.flatnonzero(_distances(words[index], words[index + 1 :]) <= NEAR) + index + 1
        for label in np.unique(labels[near]):
            labels[labels == label] = labels[index]
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return sorted(tuple(group.tolist()) for group in members if len(group) > 1)


def nearest(value: int, hashes: Sequence[int]) -> int | None:
    """Return the index of the hash nearest to ``value``, if it is a near duplicate."""
    if not hashes:
        return None
    distances = _distances(_words([value])[0], _words(hashes))
    return int(distances.argmin()) if distances.min() <= NEAR else None


def _words(hashes: Sequence[int]) -> np.ndarray:
    """Convert 128-bit hashes to [N, 2] uint64."""
    import numpy as np

    joined = b"".join(value.to_bytes(16) for value in hashes)
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


def _distances(value: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Count the bits in which each row of ``words`` differs from ``value``."""
    import numpy as np

    return np.bitwise_count(words ^ value).sum(axis=1, dtype=np.int64)
