"""Open files that may be anything: only regular ones are read, and only so many bytes of them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for a writer as a pipe would.

    Raises:
        OSError: it can't be opened, or is a pipe, a device, a socket or a folder.
    """
    # O_NONBLOCK means nothing for a regular file; Windows has neither it nor pipes in folders.
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(file))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def is_regular(file: Path) -> bool:
    """Return whether a path leads to a regular file; no, where it is too long to be a path."""
    try:
        return file.is_file()
    except OSError:
        return False
