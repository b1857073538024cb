"""What goes wrong underneath a store, told as one line: what, where and how to fix it."""

import asyncio
import errno
import math
from typing import NoReturn

from dbtrain.errors import ShardError

MESSAGE_LIMIT = 300
"""Characters of a foreign message that are repeated; S3 servers answer with pages."""

TRANSIENT_ERRNOS = frozenset({errno.EREMOTEIO if hasattr(errno, "EREMOTEIO") else errno.EIO, errno.EBUSY, errno.EIO})

TRANSIENT_NAMES = frozenset(
    {"HTTPClientError", "ResponseParserError", "IncompleteReadError", "FSTimeoutError", "HttpError", "ClientError"}
)
"""Foreign exception classes (botocore, aiohttp, gcsfs), by name because those packages are optional."""

FULL = (errno.ENOSPC, errno.EDQUOT)
PATHS = {
    errno.ENOTDIR: "a part of this path is a file and no directory; check the path",
    errno.EEXIST: "a file, or a link that leads nowhere, has this name; choose another place or remove it",
    errno.ELOOP: "its links lead in a circle; repair them or give the real path",
    errno.EISDIR: "it is a directory, and a file belongs there; check the path",
    errno.ENAMETOOLONG: "a name in it is too long for the file system; choose a shorter out= or name=",
}
"""Mistakes in a path, told by the operating system."""
DENIED = (errno.EACCES, errno.EPERM)


class MissingError(ShardError):
    """The named file does not exist, as opposed to: could not be read."""


class DamagedError(ShardError):
    """The content is torn, flipped or hostile, as opposed to:
    belongs to something else, or cannot be reached."""


def short(value: object, limit: int = 80) -> str:
    """``repr`` of a value that came from a file, cut, and always on one line."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def one_line(err: BaseException) -> str:
    """Message of a foreign exception as one line of at most ``MESSAGE_LIMIT`` characters, never empty."""
    text = " ".join(str(err).split()) or type(err).__name__
    return text[:MESSAGE_LIMIT]


def is_transient(err: BaseException) -> bool:
    """True for what may pass by itself: timeouts, lost connections, an object store's 500, 503 and 409."""
    if isinstance(err, (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)):
        return False
    if isinstance(err, (TimeoutError, ConnectionError, asyncio.TimeoutError)):
        return True
    # Names first: botocore's read timeout is also an OSError, one without a number.
    if any(base.__name__ in TRANSIENT_NAMES for base in type(err).__mro__):
        return True
    return isinstance(err, OSError) and err.errno in TRANSIENT_ERRNOS


def translate(err: Exception, doing: str, where: str) -> ShardError:
    """The ShardError to raise ``from err``; ``doing`` is a verb (``write``), ``where`` a path or URL."""
    if isinstance(err, ShardError):
        return err
    if isinstance(err, FileNotFoundError):
        return MissingError(f"cannot {doing} {where}: it does not exist; check the path or the bucket")
    return ShardError(f"cannot {doing} {where}: {_reason(err)}")


def _reason(err: Exception) -> str:
    """What happened and the fix, for anything but a missing file."""
    code = getattr(err, "errno", None)
    if code in FULL:
        return "the disk is full; free space or move the run to another disk, then run the same command again"
    if code == errno.EFBIG:
        return "the file would exceed the file size limit; raise it (ulimit -f) or use another file system"
    if code in PATHS:
        return PATHS[code]
    if code == errno.EROFS:
        return f"its file system is read-only ({one_line(err)}); mount it for writing, or copy the run to another disk"
    if code in DENIED or isinstance(err, PermissionError):
        return f"permission denied ({one_line(err)}); check the owner and mode, or the credentials of the object store"
    if isinstance(err, ImportError):
        return f"{one_line(err)}; install the fsspec driver of this kind of URL (s3fs for s3://, gcsfs for gs://)"
    if type(err).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return f"{one_line(err)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or give the node a role"
    if is_transient(err):
        return (
            f"the storage does not answer ({type(err).__name__}: {one_line(err)}); "
            "check the disk, the network and the endpoint (AWS_ENDPOINT_URL), then run the same command again"
        )
    return f"{type(err).__name__}: {one_line(err)}; check that the storage is healthy"


def damaged(where: str, what: str) -> NoReturn:
    """Raise the DamagedError of a file: what is wrong and the one fix that there is."""
    raise DamagedError(f"{where} is damaged: {what}; restore it from a copy or delete it")


def is_finite_number(value: object) -> bool:
    """True for an int or float (no bool) that is neither NaN nor infinite."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
