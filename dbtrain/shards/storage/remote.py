"""Objects of an object store (s3://, gs://) or of memory:// through fsspec;
one put makes an object visible whole."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from glob import has_magic
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from dbtrain.errors import ShardError
from dbtrain.shards.storage.content import PIECE, Content
from dbtrain.shards.storage.errors import MissingError, is_transient, translate

RETRY_DELAYS_S = (0.2, 1.0)
"""Pauses between the tries of one operation: three tries in all."""

PUT_LIMIT_S = 60.0
SLOWEST_BYTES_S = 1_000_000
"""An upload may take ``PUT_LIMIT_S`` and a second for each so many bytes; what is slower counts as hung."""

PART = 32 << 20
"""Bytes of one part of a large upload."""
MOST_PARTS = 9000
"""S3 takes 10,000 parts of one object."""
PARTS_AT_ONCE = 4

S3_PROTOCOLS = ("s3", "s3a")
IN_PARTS = frozenset({*S3_PROTOCOLS, "gs", "gcs"})
"""Protocols whose drivers upload in parts, as slices of the content that are made when they are needed."""

CONFLICT_CODES = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
"""What S3 answers to a conditional put whose condition does not hold (any more)."""

T = TypeVar("T")


def open_remote(url: str) -> "RemoteFiles":
    """The objects below a URL. Credentials and endpoint come from the environment (AWS_*,
    FSSPEC_*), never from code.

    Raises:
        ShardError: the protocol is unknown or its driver is not installed.
    """
    protocol = url.split("://", 1)[0]
    if protocol not in fsspec.available_protocols():
        raise ShardError(
            f"cannot open {url}: {protocol}:// is no kind of place that is known here; give a path, s3:// or gs://"
        )
    options: dict[str, Any] = {"use_listings_cache": False}  # others write to the same directories
    if protocol in S3_PROTOCOLS:
        # Retries nest (botocore 5 x s3fs 5 x ours 3: minutes for one hung request, and a
        # conditional put whose reply was lost would be repeated unseen), so only ours are left on.
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 1}, **given}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, OSError) as err:
        raise translate(err, "open", url) from err
    if protocol in S3_PROTOCOLS:
        fs.retries = 1
    return RemoteFiles(fs, str(path).rstrip("/"))


class RemoteFiles:
    """Operations on objects below one prefix; names are already checked by the store."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _try(self, doing: str, path: str, call: Callable[[], T]) -> T:
        """Call up to three times; the drivers raise anything from OSError to botocore's own,
        hence the broad except."""
        for delay in (*RETRY_DELAYS_S, None):
            try:
                return call()
            except Exception as err:
                if delay is None or not is_transient(err):
                    raise translate(err, doing, self.fs.unstrip_protocol(path)) from err
            time.sleep(delay)
        raise AssertionError("unreachable: the last try returns or raises")

    def exists(self, name: str) -> bool:
        """True for an object or for a prefix of one."""
        path = self._path(name)

        def look() -> bool:
            # Not fs.exists, which takes some failures for an absence.
            try:
                self.fs.info(path)
            except FileNotFoundError:
                return False
            return True

        return self._try("look at", path, look)

    def read(self, name: str) -> bytes:
        """Content of an object."""
        path = self._path(name)
        return self._try("read", path, lambda: bytes(self.fs.cat_file(path)))

    @contextlib.contextmanager
    def reading(self, name: str, start: int) -> Iterator["RemoteReader"]:
        """An object to be read from some place on, by requests for a piece each."""
        size = self.size(name)

        def piece(start: int, end: int) -> bytes:
            path = self._path(name)
            return self._try("read", path, lambda: bytes(self.fs.cat_file(path, start=start, end=end)))

        yield RemoteReader(self.fs.unstrip_protocol(self._path(name)), size, start, piece)

    def size(self, name: str) -> int:
        """Bytes of an object."""
        path = self._path(name)
        return self._try("look at", path, lambda: int(self.fs.info(path)["size"]))

    def version(self, name: str) -> str:
        """The object's ETag, or its time; '' if the driver tells neither."""
        path = self._path(name)
        info = self._try("look at", path, lambda: dict(self.fs.info(path)))
        return str(next((info[key] for key in ("ETag", "etag", "LastModified", "updated", "mtime") if key in info), ""))

    def write(self, name: str, data: bytes | Content) -> None:
        """One put; a large object is uploaded in parts and appears when the last one has arrived."""
        path = self._path(name)
        self._try("write", path, lambda: self._put(path, data))

    def write_stream(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """An upload in parts, which appears when the last one is there; S3 forgets one that was given up."""
        path = self._path(name)

        def upload() -> None:
            file = self.fs.open(path, "wb", block_size=PART)
            try:
                for piece in pieces():
                    file.write(piece)
                file.close()
            except BaseException:
                _give_up(file)
                raise

        self._try("write", path, upload)

    def create(self, name: str, data: bytes | Content) -> bool:
        """Conditional put (If-None-Match: *). A driver without one looks first, which is best effort."""
        path, tries = self._path(name), iter(range(9))

        def put() -> bool:
            again = next(tries) > 0
            try:
                self._put(path, data, mode="create")
            except FileExistsError:
                # On a second try the object may be our own: the first reply can have been lost after the put.
                return again and self._holds(path, Content.of(data))
            return True

        return self._try("create", path, put)

    def _holds(self, path: str, content: Content) -> bool:
        """Whether an object is exactly this; both are looked at piece by piece."""
        if self.fs.info(path)["size"] != len(content):
            return False
        starts = range(0, len(content), PIECE)
        return all(
            self.fs.cat_file(path, start=start, end=min(start + PIECE, len(content))) == content[start : start + PIECE]
            for start in starts
        )

    def append(self, name: str, data: bytes) -> None:
        """Read, add, write: for one writer at a time."""
        try:
            before = self.read(name)
        except MissingError:
            before = b""
        self.write(name, before + data)

    def swap(self, name: str, old: bytes, new: bytes | None) -> bool:
        """Compare and swap: If-Match on S3. Elsewhere, and for a removal,
        compare and then act (best effort)."""
        path = self._path(name)

        def act() -> bool:
            try:
                etag = self.fs.info(path).get("ETag")
                now = self.fs.cat_file(path)
            except FileNotFoundError:
                return False
            if now == new:
                return True  # our own put, whose reply was lost
            if now != old:
                return False
            if new is None:
                self.fs.rm_file(path)
                return True
            return self._put_if(path, new, etag)

        return self._try("replace", path, act)

    def _put(self, path: str, data: bytes | Content, **condition: str) -> None:
        """Put with a deadline: a server that never says "100
        Continue" is waited for by s3fs without any timeout."""
        size = len(data)
        options: dict[str, Any] = {"timeout": PUT_LIMIT_S + size / SLOWEST_BYTES_S} if self.fs.async_impl else {}
        if size <= PART:
            self.fs.pipe_file(path, data[:], **condition, **options)
        elif IN_PARTS.intersection(_protocols(self.fs)):
            options |= {"chunksize": max(PART, -(-size // MOST_PARTS))}
            if self.fs.protocol == S3_PROTOCOLS:
                options |= {"max_concurrency": PARTS_AT_ONCE}
            self.fs.pipe_file(path, data, **condition, **options)
        else:
            self._put_buffered(path, Content.of(data), new="mode" in condition)

    def _put_buffered(self, path: str, content: Content, new: bool) -> None:
        """Write through the driver's own file, which uploads as it fills; the object appears at its close."""
        with self.fs.open(path, "xb" if new else "wb", block_size=PART) as file:
            for piece in content.in_order():
                file.write(piece)

    def _put_if(self, path: str, data: bytes, etag: str | None) -> bool:
        """Put unless the object changed since ``etag``; unconditional where the driver knows no etag."""
        condition = {"IfMatch": etag} if etag is not None and self.fs.protocol == S3_PROTOCOLS else {}
        try:
            self._put(path, data, **condition)
        except OSError as err:
            answer = getattr(err.__cause__, "response", None) or {}
            if answer.get("Error", {}).get("Code") in CONFLICT_CODES:
                return False
            raise
        return True

    def list(self, name: str) -> list[str]:
        """Names directly below, in any order."""
        path = self._path(name)

        def names() -> list[str]:
            try:
                entries = self.fs.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return [child for child in (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries) if child]

        return self._try("list", path, names)

    def remove(self, name: str) -> None:
        """Remove an object or all those below a prefix, if there are any."""
        path = self._path(name)

        def drop() -> None:
            with contextlib.suppress(FileNotFoundError):
                if not has_magic(path):
                    self.fs.rm(path, recursive=True)
                    return
                for file in self.fs.find(path):  # rm would take such a name for a pattern, and remove what matches it
                    self.fs.rm_file(file)

        self._try("remove", path, drop)

    def copy(self, name: str, to: str) -> None:
        """Copy inside the object store; the bytes do not travel."""
        source, target = self._path(name), self._path(to)
        self._try("copy", source, lambda: self.fs.cp_file(source, target))

    def makedirs(self, name: str) -> None:
        """Nothing: an object store has no directories."""

    @contextlib.contextmanager
    def downloaded(self, name: str) -> Iterator[Path]:
        """A temporary local copy, removed afterwards."""
        path = self._path(name)
        with tempfile.TemporaryDirectory(prefix="dbtrain-") as folder:
            target = Path(folder) / path.rsplit("/", 1)[-1]
            self._try("download", path, lambda: self.fs.get_file(path, str(target)))
            yield target


class RemoteReader:
    """An object that is read by requests for a piece each."""

    def __init__(self, where: str, size: int, start: int, piece: Callable[[int, int], bytes]) -> None:
        self._where = where
        self.size = size
        self._at = start
        self._piece = piece

    def readinto(self, into: memoryview) -> int:
        """Fill memory with what comes next; returns how many bytes that were."""
        done, count = 0, min(len(into), self.size - self._at)
        while done < count:
            data = self._piece(self._at, self._at + min(PIECE, count - done))
            if not data:  # it has shrunk meanwhile
                break
            if len(data) > count - done:
                raise ShardError(f"{self._where} is given only whole by its server: download it, and give that path")
            into[done : done + len(data)] = data
            done, self._at = done + len(data), self._at + len(data)
        return done


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _give_up(file: Any) -> None:
    """Leave an upload unfinished: to close it, or to collect it as garbage, would finish it."""
    with contextlib.suppress(Exception):
        file.discard()
    with contextlib.suppress(AttributeError):
        file.closed = True
