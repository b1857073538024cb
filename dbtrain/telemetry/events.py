"""Events of one attempt of one block, appended to ``events.jsonl`` one JSON object a line.

To add a line to an object is to write it anew as a whole. So in an object store the events go on in
``events.jsonl.1``, ``events.jsonl.2`` ... once a piece has reached `PIECE`: what is written stays in
proportion to what is said.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dbtrain.errors import ShardError
from dbtrain.shards.storage.errors import MissingError
from dbtrain.shards.storage.store import Store

EVENTS = "events.jsonl"
COORDINATOR = "coordinator"
"""Writer of what is known of an attempt outside its workers."""
PIECE = 1 << 15
"""Bytes from which on a piece of a log in an object store is full, and lines go into the next one."""
HELD = 1000
"""Lines at most that wait for a storage that is away; of more the oldest are lost."""


def events_of(writer: int | str, piece: int = 0) -> str:
    """Name of the file of a rank, or of `COORDINATOR`: each has its own:
    adding to a file is for one process."""
    name = EVENTS if writer == 0 else f"events-{writer}.jsonl"
    return f"{name}.{piece}" if piece else name


class EventLog:
    """Append events; a line is written whole or, if the machine dies, torn and later ignored.

    Args:
        store: directory of the attempt.
        writer: rank of the worker within its block, or `COORDINATOR`.
        clock: seconds since the epoch.
    """

    def __init__(self, store: Store, writer: int | str = 0, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.writer = writer
        self._piece = 0
        # the background writer tells of commits while the training thread tells of steps
        self._one_at_a_time = threading.Lock()
        self.clock = clock
        self._held: deque[bytes] = deque(maxlen=HELD)
        self._torn = False

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event with its time ``t``, after those that were held back.

        Raises:
            ShardError: it could not be written, and is forgotten.
        """
        with self._one_at_a_time:
            self._append(self._line(event, fields))

    def tell(self, event: str, **fields: Any) -> None:
        """Like :meth:`emit` for what nobody depends on: a storage
        that is away does not end a worker that trains."""
        with self._one_at_a_time:
            line = self._line(event, fields)
            try:
                self._append(line)
            except ShardError:
                self._held.append(line)

    def _line(self, event: str, fields: dict[str, Any]) -> bytes:
        return json.dumps({"t": round(self.clock(), 3), "event": event, **fields}).encode() + b"\n"

    def _append(self, line: bytes) -> None:
        # a full disk may have taken a part of a line, which ends here
        start, self._torn = b"\n" if self._torn else b"", True
        self.store.append(self._open_piece(), b"".join([start, *self._held, line]))
        self._held.clear()
        self._torn = False

    def _open_piece(self) -> str:
        """Name of the first piece that is not full."""
        while not self.store.is_local and _size(self.store, events_of(self.writer, self._piece)) >= PIECE:
            self._piece += 1
        return events_of(self.writer, self._piece)


def _size(store: Store, name: str) -> int:
    try:
        return store.size(name)
    except MissingError:
        return 0


class EventTail:
    """Read the events of one writer of an attempt as they come."""

    def __init__(self, store: Store, writer: int | str = 0) -> None:
        self.store = store
        self.writer = writer
        self._piece = 0
        self._taken = 0
        self._size = 0

    def read(self) -> list[dict[str, Any]]:
        """Events appended since the last call; a torn last line waits until it is whole."""
        events = self._read_piece()
        # whoever finds a piece that is full writes into the next one
        while self._size >= PIECE and _size(self.store, events_of(self.writer, self._piece + 1)):
            events += self._read_piece()  # what came between the two looks
            self._piece, self._taken, self._size = self._piece + 1, 0, 0
            events += self._read_piece()
        return events

    def _read_piece(self) -> list[dict[str, Any]]:
        name = events_of(self.writer, self._piece)
        if _size(self.store, name) in (0, self._size):
            return []
        with self.store.reading(name, self._taken) as file:
            data = bytearray(max(0, file.size - self._taken))
            file.readinto(memoryview(data))
        self._size = self._taken + len(data)
        whole = data.rfind(b"\n") + 1
        self._taken += whole
        return [event for line in data[:whole].splitlines() if (event := _parse(line)) is not None]


def _parse(line: bytes | bytearray) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event and "t" in event else None


def last_words(store: Store, workers: int) -> list[dict[str, Any]]:
    """Events of the ranks after the first, which tell only how they ended."""
    return [event for rank in range(1, workers) for event in EventTail(store, rank).read()]


def read_events(store: Store) -> list[dict[str, Any]]:
    """All whole events of the first rank of an attempt, oldest first."""
    return EventTail(store).read()
