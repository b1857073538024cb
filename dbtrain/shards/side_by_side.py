"""Work on other threads: calls side by side, and a hash beside the transfer of what it is of.

Hashing, reading and writing large pieces of memory release the interpreter. The threads are daemons, so that
the end of a worker that crashes is not held up by what it was writing.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

from dbtrain.shards.storage.content import Content

T = TypeVar("T")


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the calls, each made on a thread of its own; all have ended when this returns or raises.

    Raises:
        BaseException: what the first of those calls raised that did.
    """
    threads = [Beside(call) for call in calls]
    for thread in threads:
        thread.wait()
    return [thread.result() for thread in threads]


class Beside(Generic[T]):
    """A call on another thread, begun at once."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the call has ended, with or without an error."""
        self._thread.join()

    def result(self) -> T:
        """What the call returned, once it has; raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def _work(self) -> None:
        try:
            self._result = self._call()
        except BaseException as err:  # raised again by `result`, on the thread that asks
            self._error = err


class HashBeside:
    """SHA-256 of pieces of memory, computed on another thread while the caller goes on to the next piece."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: queue.Queue[memoryview | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "HashBeside":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.put(None)
        self._thread.join()

    def add(self, piece: memoryview) -> None:
        """Hash this after what came before; its memory must stay as it is until the end or `settle`."""
        self._pieces.put(piece)

    def settle(self) -> None:
        """Wait until all pieces so far are hashed, so that their memory can be used again."""
        self._pieces.join()

    def hexdigest(self) -> str:
        """Hash of all pieces, as 64 hex digits; asked after the end of the ``with`` block."""
        return self._digest.hexdigest()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)
            self._pieces.task_done()


def content_sha256(content: Content) -> str:
    """SHA-256 of what a file shall hold, as 64 hex digits."""
    digest = hashlib.sha256()
    for piece in content.in_order():
        digest.update(piece)
    return digest.hexdigest()
