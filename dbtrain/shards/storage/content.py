"""Bytes on their way into a file or out of one, in pieces: a large file is never in memory as a whole."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

PIECE = 16 << 20
"""Bytes that are moved or hashed at a time."""


class Content:
    """What a file shall hold: a head that may be known late, and a body that lies in memory already.

    Args:
        body: the bytes after the head; they are neither copied nor changed.
        head_size: bytes of the head.
        head: makes the head; called once, by whoever needs it first, while the others wait for it.
    """

    def __init__(
        self, body: Sequence[bytes | memoryview], head_size: int = 0, head: Callable[[], bytes] = bytes
    ) -> None:
        self._body = [memoryview(part) for part in body]
        self._head_size = head_size
        self._make_head = head
        self._head: bytes | None = None
        self._one_makes_it = threading.Lock()
        self._size = head_size + sum(len(part) for part in self._body)

    @staticmethod
    def of(data: "Content | bytes") -> "Content":
        """Bytes as content; content as it is."""
        return data if isinstance(data, Content) else Content([data])

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        """A copy of some of the bytes, for drivers that cut an upload into parts of their own size."""
        start, stop, _ = part.indices(self._size)
        parts, at = [], 0
        for piece in (memoryview(self._known_head()), *self._body):
            parts.append(piece[max(0, start - at) : max(0, stop - at)])
            at += len(piece)
        return b"".join(parts)

    def in_order(self) -> Iterator[memoryview]:
        """All bytes, head first."""
        for part in (memoryview(self._known_head()), *self._body):
            yield from _cut(part)

    def as_known(self) -> Iterator[tuple[int, memoryview]]:
        """All bytes with each piece's place in the file; the head comes last, since it may be known late."""
        at = self._head_size
        for part in self._body:
            for piece in _cut(part):
                yield at, piece
                at += len(piece)
        if self._head_size:
            yield 0, memoryview(self._known_head())

    def _known_head(self) -> bytes:
        with self._one_makes_it:
            if self._head is None:
                self._head = self._make_head()
        return self._head


def _cut(part: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(part), PIECE):
        yield part[start : start + PIECE]


class Stream:
    """What a file shall hold, made piece by piece as it is written; its size is known at its end."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces

    def as_known(self) -> Iterator[tuple[int, memoryview]]:
        """Each piece with its place in the file; once."""
        at = 0
        for piece in self._pieces:
            yield at, memoryview(piece)
            at += len(piece)


class Reader(Protocol):
    """A file that is read from its start or some other place to its end."""

    size: int
    """Bytes of the whole file."""

    def readinto(self, into: memoryview) -> int:
        """Fill memory with what comes next; returns how many bytes that were, fewer only at the end."""
        ...


class BytesReader:
    """A file whose content is in memory already."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._rest = memoryview(data)

    def readinto(self, into: memoryview) -> int:
        """Fill memory with what comes next; returns how many bytes that were."""
        count = min(len(into), len(self._rest))
        into[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
