"""Events of one attempt of one block, appended to ``events.jsonl`` one JSON object a line."""

import json
import time
from collections.abc import Callable
from typing import Any

from dbtrain.shards.store import Store

EVENTS = "events.jsonl"


class EventLog:
    """Append events; a line is written whole or, if the machine dies, torn and later ignored.

    Args:
        store: directory of the attempt.
        clock: seconds since the epoch.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.clock = clock

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event with its time ``t``."""
        line = json.dumps({"t": round(self.clock(), 3), "event": event, **fields})
        self.store.append(EVENTS, line.encode() + b"\n")


class EventTail:
    """Read the events of an attempt as they come."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._taken = 0

    def read(self) -> list[dict[str, Any]]:
        """Events appended since the last call; a torn last line waits until it is whole."""
        if not self.store.exists(EVENTS):
            return []
        data = self.store.read(EVENTS)[self._taken :]
        whole = data.rfind(b"\n") + 1
        self._taken += whole
        return [event for line in data[:whole].splitlines() if (event := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event and "t" in event else None


def read_events(store: Store) -> list[dict[str, Any]]:
    """All whole events of an attempt, oldest first."""
    return EventTail(store).read()
