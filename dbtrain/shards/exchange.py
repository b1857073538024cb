"""Put a finished directory in the place of another in one step."""

import ctypes
import errno
import os
from pathlib import Path

from dbtrain.shards.faults import translate
from dbtrain.shards.local import fsync_dir
from dbtrain.shards.store import Store

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def put_in_place(store: Store, name: str, to: str) -> None:
    """Give the directory ``name`` of a local store the name ``to``; what had that name has ``name`` afterwards.

    Raises:
        ShardError: the file system refused.
    """
    built, final = store.path / name, store.path / to
    try:
        if not final.exists():
            os.rename(built, final)
        elif not _exchange(built, final):
            _two_renames(built, final)
        fsync_dir(store.path)
    except OSError as err:
        raise translate(err, "put in place", str(final)) from err


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names atomically (Linux renameat2); False where kernel, C library or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(two))


def _two_renames(built: Path, final: Path) -> None:
    """Between the two there is no merged model for an instant, but never half a one."""
    aside = built.with_name(built.name + "-old")
    os.rename(final, aside)
    os.rename(built, final)
    os.rename(aside, built)
