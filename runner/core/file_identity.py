"""What tells a file from others, and from itself before it was changed."""

from __future__ import annotations

import os

# Device, inode, size, and times of change of content and of inode, in nanoseconds.
Identity = tuple[int, int, int, int, int]


def identity_of(stat: os.stat_result) -> Identity:
    """A file's identity, which changes whenever its bytes are written anew."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
