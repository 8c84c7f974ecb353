"""Files of which parts were never written."""

from __future__ import annotations

import errno
import os


def is_hollow(descriptor: int) -> bool:
    """Return whether more than half of an open file is holes, as a broken download leaves it.

    A file system that keeps no holes has none to tell of. The position in the file is kept.
    """
    size, before = os.fstat(descriptor).st_size, os.lseek(descriptor, 0, os.SEEK_CUR)
    if not size or not hasattr(os, "SEEK_DATA"):
        return False
    data = at = 0
    try:
        while at < size and data <= size // 2:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            data += at - start
    except OSError as error:
        if error.errno != errno.ENXIO:  # which says that there is no data up to the end
            return False
    finally:
        os.lseek(descriptor, before, os.SEEK_SET)
    return data <= size // 2
