"""Objects of an object store (s3://, gs://) or of memory:// through fsspec; one put makes an object visible whole."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from dbtrain.shards.storage.errors import MissingError, is_transient, translate

RETRY_DELAYS_S = (0.2, 1.0)
"""Pauses between the tries of one operation: three tries in all."""

PUT_LIMIT_S = 60.0
SLOWEST_BYTES_S = 1_000_000
"""An upload may take ``PUT_LIMIT_S`` and a second for each so many bytes; what is slower counts as hung."""

S3_PROTOCOLS = ("s3", "s3a")

CONFLICT_CODES = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
"""What S3 answers to a conditional put whose condition does not hold (any more)."""

T = TypeVar("T")


def open_remote(url: str) -> "RemoteFiles":
    """The objects below a URL. Credentials and endpoint come from the environment (AWS_*, FSSPEC_*), never from code.

    Raises:
        ShardError: the protocol is unknown or its driver is not installed.
    """
    protocol = url.split("://", 1)[0]
    options: dict[str, Any] = {"use_listings_cache": False}  # others write to the same directories
    if protocol in S3_PROTOCOLS:
        # Retries nest (botocore 5 x s3fs 5 x ours 3: minutes for one hung request, and a conditional put whose reply
        # was lost would be repeated unseen), so only ours are left on.
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
        """Call up to three times; the drivers raise anything from OSError to botocore's own, hence the broad except."""
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

    def size(self, name: str) -> int:
        """Bytes of an object."""
        path = self._path(name)
        return self._try("look at", path, lambda: int(self.fs.info(path)["size"]))

    def version(self, name: str) -> str:
        """The object's ETag, or its time; '' if the driver tells neither."""
        path = self._path(name)
        info = self._try("look at", path, lambda: dict(self.fs.info(path)))
        return str(next((info[key] for key in ("ETag", "etag", "LastModified", "updated", "mtime") if key in info), ""))

    def write(self, name: str, data: bytes) -> None:
        """One put; a large object is uploaded in parts and appears when the last one has arrived."""
        path = self._path(name)
        self._try("write", path, lambda: self._put(path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Conditional put (If-None-Match: *). A driver without one looks first, which is best effort."""
        path, tries = self._path(name), iter(range(9))

        def put() -> bool:
            again = next(tries) > 0
            try:
                self._put(path, data, mode="create")
            except FileExistsError:
                # On a second try the object may be our own: the first reply can have been lost after the put.
                return again and bool(self.fs.cat_file(path) == data)
            return True

        return self._try("create", path, put)

    def append(self, name: str, data: bytes) -> None:
        """Read, add, write: for one writer at a time."""
        try:
            before = self.read(name)
        except MissingError:
            before = b""
        self.write(name, before + data)

    def swap(self, name: str, old: bytes, new: bytes | None) -> bool:
        """Compare and swap: If-Match on S3. Elsewhere, and for a removal, compare and then act (best effort)."""
        path = self._path(name)

        def act() -> bool:
            try:
                etag = self.fs.info(path).get("ETag")
                found = self.fs.cat_file(path)
            except FileNotFoundError:
                return False
            if found == new:
                return True  # our own put, whose reply was lost
            if found != old:
                return False
            if new is None:
                self.fs.rm_file(path)
                return True
            return self._put_if(path, new, etag)

        return self._try("replace", path, act)

    def _put(self, path: str, data: bytes, **condition: str) -> None:
        """Put with a deadline: a server that never says "100 Continue" is waited for by s3fs without any timeout."""
        limit = {"timeout": PUT_LIMIT_S + len(data) / SLOWEST_BYTES_S} if self.fs.async_impl else {}
        self.fs.pipe_file(path, data, **condition, **limit)

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
                found = self.fs.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return [child for child in (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found) if child]

        return self._try("list", path, names)

    def remove(self, name: str) -> None:
        """Remove an object or all those below a prefix, if there are any."""
        path = self._path(name)

        def drop() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

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
