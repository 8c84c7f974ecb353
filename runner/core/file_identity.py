"""The identity of a file and its content, from stat."""

from __future__ import annotations

import os

# Device, inode, size, and the modification times of content and inode, in nanoseconds.
Identity = tuple[int, int, int, int, int]


def identity_of(stat: os.stat_result) -> Identity:
    """Return a file's identity, which changes whenever the file is written again."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
