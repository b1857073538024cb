"""Files of a local or mounted directory, written so that a
kill or a power cut leaves the old or the new file."""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dbtrain.shards.storage.content import Content, Stream
from dbtrain.shards.storage.errors import translate

NO_LINK = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
"""Answers of a file system that cannot make this hard link; the reader falls back to copying."""


@contextlib.contextmanager
def _told(doing: str, where: Path) -> Iterator[None]:
    """Turn any OSError into the ShardError that names the path and the fix."""
    try:
        yield
    except OSError as err:
        raise translate(err, doing, str(where)) from err


class LocalFiles:
    """Operations on paths below one root; names are already checked by the store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self, name: str) -> bool:
        """True for a file or directory."""
        path = self.root / name
        with _told("look at", path):
            try:
                path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def read(self, name: str) -> bytes:
        """Content of a file."""
        path = self.root / name
        with _told("read", path):
            return path.read_bytes()

    @contextlib.contextmanager
    def reading(self, name: str, start: int) -> Iterator["LocalReader"]:
        """A file to be read from some place on."""
        path = self.root / name
        with _told("read", path):
            fd = os.open(path, os.O_RDONLY)
        try:
            yield LocalReader(fd, path, start)
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        path = self.root / name
        with _told("look at", path):
            return path.stat().st_size

    def version(self, name: str) -> str:
        """Time of the last write and number of the inode."""
        path = self.root / name
        with _told("look at", path):
            state = path.stat()
            return f"{state.st_mtime_ns}-{state.st_ino}"

    def write(self, name: str, data: bytes | Content) -> None:
        """Replace a file: temporary file, fsync, rename, fsync
        of the directory (or the rename may not survive)."""
        path = self.root / name
        with _told("write", path), self._written(path, data) as temporary:
            os.replace(temporary, path)
            fsync_dir(path.parent)

    def write_stream(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """Like write, of pieces; one that cannot be made leaves the file as it was."""
        path = self.root / name
        with _told("write", path), self._written(path, Stream(pieces())) as temporary:
            os.replace(temporary, path)
            fsync_dir(path.parent)

    def create(self, name: str, data: bytes | Content) -> bool:
        """Like write, but False when the name is taken; a link
        fails on an existing name where a rename would not."""
        path = self.root / name
        with _told("create", path), self._written(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as err:
                if err.errno not in NO_LINK:
                    raise
                return _create_without_link(temporary, path)
            fsync_dir(path.parent)
        return True

    @contextlib.contextmanager
    def _written(self, path: Path, data: bytes | Content | Stream) -> Iterator[Path]:
        """A temporary file beside ``path`` with the data safely on disk; what is left of it is removed."""
        ensure_dir(path.parent)
        temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
        try:
            _write_new(temporary, data)
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def append(self, name: str, data: bytes) -> None:
        """Append with O_APPEND, so that lines of several processes do not cut each other."""
        path = self.root / name
        with _told("append to", path):
            ensure_dir(path.parent)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                _write_all(fd, data)
            finally:
                os.close(fd)

    def swap(self, name: str, old: bytes, new: bytes | None) -> bool:
        """Compare and swap under flock; the lock sits on a file beside,
        because a rename would take it away."""
        path = self.root / name
        with _told("replace", path), _flocked(flock_path(path)):
            try:
                if path.read_bytes() != old:
                    return False
            except FileNotFoundError:
                return False
            if new is None:
                os.unlink(path)
                fsync_dir(path.parent)
            else:
                self.write(name, new)
        return True

    def list(self, name: str) -> list[str]:
        """Names directly below, in any order, temporaries included."""
        path = self.root / name if name else self.root
        with _told("list", path):
            try:
                return os.listdir(path)
            except FileNotFoundError:
                return []

    def remove(self, name: str) -> None:
        """Remove a file or a tree, if there is one."""
        path = self.root / name
        with _told("remove", path), contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def copy(self, name: str, to: str) -> None:
        """Hard link, which costs no space and is safe because no file here is ever written in place;
        else a copy."""
        source, target = self.root / name, self.root / to
        with _told("link", source):
            ensure_dir(target.parent)
            try:
                os.link(source, target)
            except OSError as err:
                if err.errno not in NO_LINK:
                    raise
                self._copy_bytes(source, target)
            fsync_dir(target.parent)

    def _copy_bytes(self, source: Path, target: Path) -> None:
        with self._written(target, b"") as temporary:
            shutil.copyfile(source, temporary)
            fsync_file(temporary)
            os.replace(temporary, target)

    def move(self, name: str, to: str) -> None:
        """Rename a directory; one of that name is exchanged for it,
        since a rename cannot replace a full directory.

        Where the two cannot be exchanged the old one steps aside first:
        for an instant there is none, never half a one.
        """
        source, target = self.root / name, self.root / to
        aside = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        with _told("move", source):
            if target.exists() and exchange(source, target):
                os.replace(source, aside)
            else:
                if target.exists():
                    os.replace(target, aside)
                os.replace(source, target)
            fsync_dir(target.parent)
            shutil.rmtree(aside, ignore_errors=True)

    def makedirs(self, name: str) -> None:
        """Make a directory and those above it, durably."""
        path = self.root / name if name else self.root
        with _told("make the directory", path):
            make_dirs(path)


class LocalReader:
    """An open file."""

    def __init__(self, fd: int, path: Path, start: int) -> None:
        self._fd = fd
        self._path = path
        with _told("read", path):
            self.size = os.fstat(fd).st_size
            os.lseek(fd, start, os.SEEK_SET)

    def readinto(self, into: memoryview) -> int:
        """Fill memory with what comes next; returns how many bytes that were."""
        done = 0
        with _told("read", self._path):
            while done < len(into) and (count := os.readv(self._fd, [into[done:]])):
                done += count
        return done


def make_dirs(path: Path) -> None:
    """Make a directory whose name survives a power cut.

    The parent is synced even when the directory exists: a killed process may have made it and not synced.
    """
    ensure_dir(path.parent)
    path.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # a parent that one may pass but not read
        fsync_dir(path.parent)


def ensure_dir(path: Path) -> None:
    """Like :func:`make_dirs`, but an existing directory costs nothing;
    for the many writes into one directory."""
    if not path.is_dir():
        make_dirs(path)


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable; file systems that cannot (some FUSE ones) answer EINVAL."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make the content of a file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flock_path(path: Path) -> Path:
    """The file on which those wait who replace another; it stays."""
    return path.parent / f".{path.name}.flock"


def _write_new(path: Path, data: bytes | Content | Stream) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for at, piece in (data if isinstance(data, Stream) else Content.of(data)).as_known():
            os.lseek(fd, at, os.SEEK_SET)
            _write_all(fd, piece)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _create_without_link(temporary: Path, path: Path) -> bool:
    """Exclusive create where links do not exist: creators look under the flock, so two cannot both win."""
    with _flocked(flock_path(path)):
        if path.exists():
            return False
        os.replace(temporary, path)
        fsync_dir(path.parent)
    return True


@contextlib.contextmanager
def _flocked(path: Path) -> Iterator[None]:
    ensure_dir(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


AT_FDCWD = -100
RENAME_EXCHANGE = 2

UNABLE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM})
"""Answers of a kernel or file system that does not know the call."""


def exchange(one: Path, two: Path) -> bool:
    """Swap two existing names atomically (Linux renameat2);
    False where system, C library or file system cannot.

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
