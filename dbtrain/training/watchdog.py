"""A thread beside the training loop: it hears stop requests, and ends a worker that hangs or was replaced."""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dbtrain.errors import FencedError, ShardError
from dbtrain.shards.storage.fence import check
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import EventLog
from dbtrain.training.assignment import Assignment

STOP = "STOP.json"
"""File in the run's directory; it names the coordinator's session whose workers shall commit and leave."""

EXIT_HUNG = 70
EXIT_FENCED = 71
LOCAL_POLL_S = 0.5
REMOTE_POLL_S = 5.0
COMPILING_S = 3600.0
"""Seconds for which compiling does not count as time without a step."""
LAST_WORDS_S = 10.0
"""Seconds for the event that tells why a worker ends: its storage may hang as well."""


class StopRequest:
    """A flag with a reason; the first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask the worker to commit and leave."""
        self.reason = self.reason or reason


class Watchdog:
    """Poll the run's directory from a daemon thread.

    A worker that no longer owns its block ends at once: everything it could still write would be refused. One
    that makes no step for `hang_timeout_s` ends too, so that the coordinator sees a crash and starts another.

    Args:
        run, block: directories.
        assignment: assignment of the worker.
        stop: where requests are noted.
        log: event log of the first rank, which alone watches the clock: the others wait while it commits,
            and it waits for them in every step.
    """

    def __init__(
        self, run: Store, block: Store, assignment: Assignment, stop: StopRequest, log: EventLog | None = None
    ) -> None:
        self.run = run
        self.block = block
        self.assignment = assignment
        self.stop = stop
        self.log = log
        self._touched = time.monotonic()
        self._closing = threading.Event()
        self._poll_s = LOCAL_POLL_S if run.is_local else REMOTE_POLL_S

    def start(self) -> None:
        """Begin; the time without a step counts from now."""
        self.touch()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def touch(self) -> None:
        """The loop is alive."""
        self._touched = time.monotonic()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """The clock stands still while a checkpoint is read or written, which takes as long as it is large.

        A storage that hangs ends by time-outs of its own, or would hold up the next attempt as well.
        """
        self._touched = math.inf
        try:
            yield
        finally:
            self.touch()

    def compiling(self) -> None:
        """The clock stands still until the next `touch`, but for an hour at most: a compiler may hang too."""
        self._touched = time.monotonic() + COMPILING_S

    def close(self) -> None:
        """End the thread."""
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(self._poll_s):
            if self.log and time.monotonic() - self._touched > self.assignment.hang_timeout_s:
                self._end_hung(self.log)
            try:
                self._look()
            except ShardError:
                # the storage is away for a moment; the commit will say so if it stays away
                continue

    def _end_hung(self, log: EventLog) -> None:
        error = (
            f"no step for {self.assignment.hang_timeout_s:g} s, so the worker counts as hung and ends: raise "
            "cluster.hang_timeout_s if a step or loading the data may take longer"
        )
        said = {"outcome": "crashed", "reason": self.stop.reason, "error": error}
        words = threading.Thread(target=log.tell, args=("end",), kwargs=said, daemon=True)
        words.start()
        words.join(LAST_WORDS_S)
        os._exit(EXIT_HUNG)

    def _look(self) -> None:
        try:
            check(self.block, self.assignment.token)
        except FencedError:
            os._exit(EXIT_FENCED)
        if self.run.exists(STOP):
            request = self.run.read_json(STOP)
            if isinstance(request, dict) and request.get("session") == self.assignment.session:
                self.stop.request(str(request.get("reason", "stop")))
