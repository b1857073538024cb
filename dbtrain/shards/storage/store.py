"""A directory that may lie on a disk or in an object store;
everything this project keeps is read and written here."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from dbtrain.errors import ShardError
from dbtrain.shards.checksummed_json import canonical, parse_json
from dbtrain.shards.storage.content import PIECE, Content, Reader
from dbtrain.shards.storage.errors import short
from dbtrain.shards.storage.local import LocalFiles
from dbtrain.shards.storage.remote import RemoteFiles, open_remote


class Files(Protocol):
    """What a kind of storage must be able to do; names are relative,
    checked, and ``""`` is the directory itself."""

    def exists(self, name: str) -> bool:
        """True for a file or directory."""
        ...

    def read(self, name: str) -> bytes:
        """Content."""
        ...

    def reading(self, name: str, start: int) -> contextlib.AbstractContextManager[Reader]:
        """A reader that begins at some byte."""
        ...

    def size(self, name: str) -> int:
        """Bytes."""
        ...

    def version(self, name: str) -> str:
        """Changes whenever the file is replaced."""
        ...

    def write(self, name: str, data: bytes | Content) -> None:
        """Create or replace, atomically and durably."""
        ...

    def write_stream(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """Like write, of pieces one after the other."""
        ...

    def create(self, name: str, data: bytes | Content) -> bool:
        """Create unless it exists."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Add at the end."""
        ...

    def swap(self, name: str, old: bytes, new: bytes | None) -> bool:
        """Replace, or remove (None), if the content is ``old``."""
        ...

    def list(self, name: str) -> list[str]:
        """Names directly below, in any order."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file or tree, if there is one."""
        ...

    def copy(self, name: str, to: str) -> None:
        """Second name for the same content."""
        ...

    def makedirs(self, name: str) -> None:
        """Make it and those above."""
        ...


class Store:
    """A directory by local path or URL.

    Every method raises ShardError (``storage.errors.MissingError`` when the named file does not exist) with
    the path and a fix; transient errors of an object store are tried three times first. Names may contain
    ``/`` but never leave the directory. Names that begin with a dot are the store's own temporaries.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self._files, self._prefix, self._url = _open(os.fspath(url))

    @property
    def url(self) -> str:
        """Absolute path of a local directory, or the URL, without a slash at the end."""
        return self._url

    @property
    def is_local(self) -> bool:
        """True for a directory on a disk or mount."""
        return isinstance(self._files, LocalFiles)

    @property
    def path(self) -> Path:
        """Path of a local store.

        Raises:
            ShardError: the store is not local.
        """
        if not isinstance(self._files, LocalFiles):
            raise ShardError(f"{self._url} is not a local directory; give a path on a disk")
        return self._files.root / self._prefix

    def child(self, *parts: str) -> "Store":
        """The store of a directory below; it need not exist."""
        name = _checked("/".join(parts), self._url)
        child = object.__new__(Store)
        child._files, child._prefix, child._url = self._files, self._at(name), f"{self._url}/{name}"
        return child

    def where(self, name: str) -> str:
        """How messages call a file of this store."""
        return f"{self._url}/{name}"

    def exists(self, name: str) -> bool:
        """True for a file or directory; False only when the storage says that there is none."""
        return self._files.exists(self._at(name))

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return self._files.read(self._at(name))

    def reading(self, name: str, start: int = 0) -> contextlib.AbstractContextManager[Reader]:
        """A file to be read piece by piece from byte ``start`` on; its size is that of when it was opened."""
        return self._files.reading(self._at(name), start)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Read at most ``size`` bytes of a file from ``start`` on; fewer where the file ends."""
        into = memoryview(bytearray(size))
        with self.reading(name, start) as file:
            return bytes(into[: file.readinto(into)])

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, as 64 hex digits, read piece by piece."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
        with self.reading(name) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        return digest.hexdigest()

    def read_text(self, name: str) -> str:
        """Content of a UTF-8 file; ShardError if it is not UTF-8."""
        try:
            return self.read(name).decode("utf-8")
        except UnicodeDecodeError as err:
            raise ShardError(f"{self.where(name)} is not UTF-8 text: {err.reason} at byte {err.start}") from err

    def read_json(self, name: str) -> Any:
        """Parsed content of a JSON file; ShardError if it is not JSON."""
        return parse_json(self.read(name), self.where(name))

    def write(self, name: str, data: bytes | Content) -> None:
        """Create or replace a file, atomically and durably:
        after a crash it is the old one or the new one."""
        self._files.write(self._at(name), data)

    def write_stream(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """Like :meth:`write` with one piece in memory at a time.

        Args:
            name: name of the file.
            pieces: makes its content; called again when a transient error of an object store ended the first
                try. What it raises is raised here, and then the file is as it was before, on a disk and on
                S3; a storage that shows what is being written may be left with a part of it.
        """
        self._files.write_stream(self._at(name), pieces)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file; ShardError if the value is not JSON (NaN is not)."""
        self.write(name, (canonical(value, self.where(name)) + "\n").encode())

    def append(self, name: str, data: bytes) -> None:
        """Append to a file: O_APPEND locally; read, add and write elsewhere,
        which is for one writer at a time."""
        self._files.append(self._at(name), data)

    def create(self, name: str, data: bytes | Content) -> bool:
        """Create a file unless it exists; True for the one creator.
        The content is complete when it is visible.

        Exact locally, on S3 (If-None-Match) and on GCS; best effort on a storage without conditional puts.
        """
        return self._files.create(self._at(name), data)

    def swap(self, name: str, old: bytes, new: bytes | None) -> bool:
        """Replace (None: remove) a file if its content is ``old``;
        False if it is not. Contents must be unique.

        Exact locally (flock) and on S3 (If-Match) except for a removal there; best effort elsewhere.
        """
        return self._files.swap(self._at(name), old, new)

    def list(self, *, temporaries: bool = False) -> list[str]:
        """Sorted names directly below, files and directories; [] when the directory does not exist."""
        names = self._files.list(self._prefix)
        return sorted(name for name in names if temporaries or not name.startswith("."))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._files.size(self._at(name))

    def version(self, name: str) -> str:
        """A text that changes when a file is replaced or written to; '' where the storage does not tell."""
        return self._files.version(self._at(name))

    def move(self, name: str, to: str) -> None:
        """Rename a directory of a local store, replacing what has that name, in one step where the disk can.

        Raises:
            ShardError: the store is not local (an object store cannot rename), or the disk refused.
        """
        if not isinstance(self._files, LocalFiles):
            raise ShardError(f"cannot rename {self.where(name)}: an object store has no rename; write in place")
        self._files.move(self._at(name), self._at(to))

    @contextlib.contextmanager
    def open_local(self, name: str) -> Iterator[Path]:
        """A path to read the file from: the file itself, or a temporary download of a remote one."""
        if isinstance(self._files, RemoteFiles):
            with self._files.downloaded(self._at(name)) as path:
                yield path
        else:
            self.size(name)  # a missing file must be told here, not by whoever opens the path
            yield self.path / name

    def remove(self, name: str) -> None:
        """Remove a file or a tree; nothing happens when there is none. A tree does not go at once."""
        self._files.remove(self._at(name))

    def copy(self, name: str, to: str) -> None:
        """Second name for the content of a file: a hard link,
        else a copy, else a copy inside the object store."""
        self._files.copy(self._at(name), self._at(to))

    def makedirs(self) -> None:
        """Make this directory and those above it, durably; nothing on an object store."""
        self._files.makedirs(self._prefix)

    def _at(self, name: str) -> str:
        name = _checked(name, self._url)
        return f"{self._prefix}/{name}" if self._prefix else name

    def __repr__(self) -> str:
        return f"Store({self._url!r})"


def _open(url: str) -> tuple[Files, str, str]:
    """Storage, prefix in it, and the name for messages."""
    if not url or "\0" in url:
        raise ShardError(f"{url!r} is not a directory: give a path or a URL such as s3://bucket/runs/one")
    if "://" not in url or url.startswith(("file://", "local://")):
        root = Path(os.path.abspath(os.path.expanduser(url.split("://", 1)[-1])))
        return LocalFiles(root), "", str(root)
    return open_remote(url.rstrip("/")), "", url.rstrip("/")


def _checked(name: str, where: str) -> str:
    """A relative name that stays below its directory; names also come from files, which may be hostile."""
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ShardError(f"{short(name)} is not a name below {where}: use relative names without '..'")
    return name
