"""Commits off the training thread: the loop takes a snapshot, one background thread writes it."""

import threading
import time
from collections.abc import Callable


class BackgroundWriter:
    """Runs one function at a time on a daemon thread.

    The function must own what it writes (a snapshot): the training thread goes on changing its parameters. The thread
    is a daemon so that a crash of the training thread is not held up; a commit that is cut off was never committed.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = False

    def submit(self, fn: Callable[[], object]) -> float:
        """Start ``fn`` in the background, after the one before has ended; returns the seconds waited for that one.

        Raises:
            Exception: whatever the function before raised; ``fn`` is then not started.
            RuntimeError: the writer is closed.
        """
        if self._closed:
            raise RuntimeError("the BackgroundWriter is closed: submit before close()")
        start = time.monotonic()
        self.drain()
        waited = time.monotonic() - start
        self._thread = threading.Thread(target=self._run, args=(fn,), name="dbtrain-writer", daemon=True)
        self._thread.start()
        return waited

    def drain(self) -> None:
        """Wait until nothing is in flight; raises what the last function raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Drain, and accept nothing more; closing twice is fine."""
        self._closed = True
        self.drain()

    def _run(self, fn: Callable[[], object]) -> None:
        try:
            fn()
        except BaseException as err:  # kept for the training thread, SystemExit included
            self._error = err
