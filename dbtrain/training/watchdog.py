"""A thread beside the training loop: it hears stop requests, and ends a worker that hangs or was replaced."""

import os
import threading
import time

from dbtrain.errors import FencedError, ShardError
from dbtrain.shards.fence import check
from dbtrain.shards.store import Store
from dbtrain.training.assignment import Assignment

STOP = "STOP.json"
"""In the run's directory; names the coordinator's session whose workers shall commit and leave."""

EXIT_HUNG = 70
EXIT_FENCED = 71
LOCAL_POLL_S = 0.5
REMOTE_POLL_S = 5.0


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

    A worker that no longer owns its block ends at once: everything it could still write would be refused. One that
    makes no step for `hang_timeout_s` ends too, so that the coordinator sees a crash and starts another.
    """

    def __init__(self, run: Store, block: Store, assignment: Assignment, stop: StopRequest) -> None:
        self.run = run
        self.block = block
        self.assignment = assignment
        self.stop = stop
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

    def close(self) -> None:
        """End the thread."""
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(self._poll_s):
            if time.monotonic() - self._touched > self.assignment.hang_timeout_s:
                os._exit(EXIT_HUNG)
            try:
                self._look()
            except ShardError:
                # the storage is away for a moment; the commit will say so if it stays away
                continue

    def _look(self) -> None:
        try:
            check(self.block, self.assignment.token)
        except FencedError:
            os._exit(EXIT_FENCED)
        if self.run.exists(STOP):
            request = self.run.read_json(STOP)
            if isinstance(request, dict) and request.get("session") == self.assignment.session:
                self.stop.request(str(request.get("reason", "stop")))
