"""One coordinator a run directory: a lock file with a heartbeat, taken over when its owner is dead."""

import json
import os
import secrets
import socket
import threading
import time
from types import TracebackType
from typing import Any

from dbtrain.errors import DbtrainError, RunLockedError, ShardError
from dbtrain.shards.store import Store

LOCK = "LOCK.json"


class RunLock:
    """Hold a run directory.

    Args:
        store: the run's directory.
        owner: who, for messages (a command line, say).
        ttl_s: a lock whose heartbeat is older than this may be taken over.
    """

    def __init__(self, store: Store, owner: str, ttl_s: float = 30.0) -> None:
        self.store = store
        self.ttl_s = ttl_s
        self._me = {
            "owner": owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": secrets.token_hex(8),
            "since": time.time(),
        }
        self._held = b""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunLockedError: somebody alive holds it; the message says who.
        """
        self.store.makedirs()
        content = self._content()
        if not self.store.create(LOCK, content):
            old = self.store.read(LOCK)
            self._refuse_if_alive(old)
            # of two that take over the same stale lock, the swap lets one through
            if not self.store.swap(LOCK, old, content):
                raise RunLockedError(f"{self.store.url} was just taken by another coordinator: leave it to that one")
        self._held = content
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        return json.dumps({**self._me, "beat": time.time()}).encode()

    def _refuse_if_alive(self, content: bytes) -> None:
        holder = _parse(content)
        age = time.time() - float(holder.get("beat", 0))
        here = holder.get("host") == self._me["host"]
        dead = here and not _alive(int(holder.get("pid", 0)))
        if age < self.ttl_s and not dead:
            raise RunLockedError(
                f"{self.store.url} is being worked on by {holder.get('owner')} (pid {holder.get('pid')} on "
                f"{holder.get('host')}, last heard {age:.0f} s ago): wait for it or stop it; if it is gone, its lock "
                f"ends by itself {self.ttl_s:.0f} s after its last sign of life"
            )

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl_s / 3):
            content = self._content()
            try:
                if not self.store.swap(LOCK, self._held, content):
                    return
            except DbtrainError:
                continue
            self._held = content

    def held(self) -> bool:
        """Whether the lock on disk is still this one's; it is not after a pause longer than `ttl_s`."""
        try:
            return _parse(self.store.read(LOCK)).get("token") == self._me["token"]
        except ShardError:
            return False

    def release(self) -> None:
        """Give the lock back if it is still held."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self._held:
            self.store.swap(LOCK, self._held, None)

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _parse(content: bytes) -> dict[str, Any]:
    # a damaged lock is treated as one whose owner was never heard of
    try:
        holder = json.loads(content)
        float(holder.get("beat", 0)), int(holder.get("pid", 0))
    except (ValueError, TypeError, AttributeError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
