"""Commits off the training thread: the loop takes a snapshot, one background thread writes it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Job:
    run: Callable[[], object]
    dropped: Callable[[], object]


class BackgroundWriter:
    """Runs one function at a time on a daemon thread. One more may wait, until a newer one takes its place.

    A commit that still waits when a newer one comes is dropped: the newer one makes it pointless. The
    function must own what it writes (a snapshot): the training thread goes on changing its parameters. The
    thread is a daemon so that a crash of the training thread is not held up; a commit that is cut off was
    never committed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = False
        self._waiting: _Job | None = None
        self._error: BaseException | None = None
        self._closed = False

    def submit(self, run: Callable[[], object], dropped: Callable[[], object] = lambda: None) -> None:
        """Run a function in the background after the one that runs, instead of the one that waits.

        Args:
            run: the function.
            dropped: called instead of it, if it is never begun.

        Raises:
            Exception: whatever the function before raised; this one is then dropped.
            RuntimeError: the writer is closed.
        """
        if self._closed:
            raise RuntimeError("the BackgroundWriter is closed: submit before close()")
        self.drop_waiting()
        with self._changed:
            if self._error is None:
                self._waiting = _Job(run, dropped)
                if not self._running:
                    self._running = True
                    threading.Thread(target=self._work, name="dbtrain-writer", daemon=True).start()
                return
        dropped()
        self._raise_error()

    def drop_waiting(self) -> None:
        """Forget the function that waits, if there is one: something newer is about to be submitted."""
        with self._changed:
            job, self._waiting = self._waiting, None
        if job is not None:
            job.dropped()

    def drain(self) -> None:
        """Wait until nothing runs or waits; raises what the last function raised, once."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
        self._raise_error()

    def close(self) -> None:
        """Drain, and accept nothing more; closing twice is fine."""
        self._closed = True
        self.drain()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.run()
            except BaseException as err:  # kept for the training thread, SystemExit included
                self._error = err
                self.drop_waiting()

    def _next(self) -> _Job | None:
        with self._changed:
            job, self._waiting = self._waiting, None
            self._running = job is not None
            self._changed.notify_all()
            return job
