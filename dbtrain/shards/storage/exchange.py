"""Swap the names of two directories in one step, so that a reader always finds one of them."""

import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2

UNABLE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM})
"""Answers of a kernel or file system that does not know the call."""


def exchange(one: Path, two: Path) -> bool:
    """Swap two existing names atomically (Linux renameat2); False where system, C library or file system cannot.

    Raises:
        OSError: the file system can, and refused.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(two))
