"""Which media look alike, told from their hashes; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Hashes that differ in no more of the 128 bits than this are taken for the same picture. The
# sample's pictures differ in 0 to 4 from themselves saved again at another size, light or quality,
# and in 57 and up from each other; a crop of 2% differs in 4 to 20 (tests/data/test_report.py).
NEAR = 10


def groups(hashes: Sequence[int]) -> list[tuple[int, ...]]:
    """Numbers of hashes that are near each other, or near to one that is: sorted, two and up."""
    import numpy as np

    words = _words(hashes)
    labels = np.arange(len(words))
    for index in range(len(words)):
        near = np.flatnonzero(_distances(words[index], words[index + 1 :]) <= NEAR) + index + 1
        for label in np.unique(labels[near]):
            labels[labels == label] = labels[index]
    found = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return sorted(tuple(group.tolist()) for group in found if len(group) > 1)


def nearest(value: int, hashes: Sequence[int]) -> int | None:
    """The number of the hash nearest to `value`, when that is near."""
    if not hashes:
        return None
    distances = _distances(_words([value])[0], _words(hashes))
    return int(distances.argmin()) if distances.min() <= NEAR else None


def _words(hashes: Sequence[int]) -> np.ndarray:
    """[N, 2] uint64."""
    import numpy as np

    joined = b"".join(value.to_bytes(16) for value in hashes)
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


def _distances(value: np.ndarray, words: np.ndarray) -> np.ndarray:
    """How many bits of each row of `words` differ from `value`."""
    import numpy as np

    return np.bitwise_count(words ^ value).sum(axis=1, dtype=np.int64)
