"""One coordinator a run: a lock in the run directory that
outlives neither its owner nor its owner's heartbeat."""

import contextlib
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from dbtrain.errors import RunLockedError, ShardError
from dbtrain.shards.checksummed_json import Fields, seal, unseal
from dbtrain.shards.storage.errors import DamagedError, MissingError
from dbtrain.shards.storage.store import Store

LOCK = "LOCK.json"
TTL_S = 30.0
"""Seconds without a heartbeat after which others may take a lock over."""

TRIES = 5
BEATS_PER_TTL = 3
WATCH_SHARE = 0.5
"""Share of the ttl for which a lock that looks dead by the wall clock is watched:
longer than one heartbeat."""
VERSION = 1
TIME_LIMIT_S = 1e11
"""Largest time in a lock that is believed: the year 5138."""


@dataclass(frozen=True)
class Holder:
    """Content of LOCK.json."""

    owner: str
    host: str
    machine: str
    """Tells whether a process number means anything to the reader, see :func:`machine`."""
    pid: int
    token: str
    since: float
    beat: float
    """Time of the last heartbeat, seconds since the epoch by the owner's clock."""
    ttl: float

    def dump(self, where: str) -> bytes:
        """The bytes of LOCK.json."""
        return seal(asdict(self), VERSION, where)


def parse_holder(data: bytes, where: str) -> Holder:
    """Read LOCK.json.

    Raises:
        ShardError: it is damaged, or its times are absurd.
    """
    try:
        fields = Fields(unseal(data, VERSION, where), where)
        holder = Holder(
            owner=fields.text("owner"),
            host=fields.text("host"),
            machine=fields.text("machine"),
            pid=fields.integer("pid", low=1),
            token=fields.text("token"),
            since=fields.number("since"),
            beat=fields.number("beat"),
            ttl=fields.number("ttl"),
        )
        if not 0 < holder.ttl <= TIME_LIMIT_S or not 0 <= holder.since <= TIME_LIMIT_S:
            fields.reject("ttl", f"positive, and since={holder.since} a time")
    except DamagedError as err:
        raise ShardError(f"{err}; delete it once no coordinator works on this run") from err
    return holder


def machine() -> str:
    """Same for two processes only if they see each other's process numbers: host, boot and process namespace.

    Containers may share a host name, and a restarted one gives its coordinator the same process number again.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def is_process(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's process, but a process
    return True


def is_held(store: Store) -> bool:
    """Whether a coordinator works on a run, by the clocks of this machine and its own:
    good enough to tell people.

    Raises:
        ShardError: the storage cannot be reached, or LOCK.json is damaged.
    """
    return holder_of(store) is not None


def holder_of(store: Store) -> Holder | None:
    """The coordinator of :func:`is_held`, None where there is none; raises as that does."""
    try:
        holder = parse_holder(store.read(LOCK), store.where(LOCK))
    except MissingError:
        return None
    if holder.machine == machine() and not is_process(holder.pid):
        return None
    return holder if abs(time.time() - holder.beat) <= holder.ttl else None


class RunLock:
    """Coordinator's lock on a run directory, local or remote; also a context manager.

    Args:
        owner: who this is, in words, for the message that others get.
        ttl_s: seconds without a heartbeat after which others may take the lock over;
            a heartbeat comes every third.
    """

    def __init__(self, store: Store, owner: str, ttl_s: float = TTL_S) -> None:
        self._store, self._where = store, store.where(LOCK)
        if not ttl_s > 0:
            raise ShardError(f"ttl_s={ttl_s} of {self._where} must be a positive number of seconds")
        now = time.time()
        self._mine = Holder(
            owner, socket.gethostname(), machine(), os.getpid(), secrets.token_hex(16), now, now, float(ttl_s)
        )
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: str | None = None

    def acquire(self) -> None:
        """Take the lock, or take it over from an owner that is dead, and start the heartbeat.

        A lock whose heartbeat is old by the wall clock, and whose owner is not known to be dead, is first
        watched for half its ttl: clocks of different machines differ, and a machine that slept goes on with
        an old heartbeat.

        Raises:
            RunLockedError: another coordinator holds it: who, since when, and how to fix it.
            ShardError: the storage cannot be reached, LOCK.json is damaged, or locks cannot be renewed there.
        """
        if self._thread is not None:
            raise RunLockedError(f"{self._where} is already held by this RunLock: acquire it once")
        now = time.time()
        self._mine = replace(self._mine, since=now, beat=now, token=secrets.token_hex(16))
        self._take()
        self._lost = None
        self._try_renewing()
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat_on, name="dbtrain-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Return while the lock is held; RunLockedError once somebody else has taken it over."""
        if self._thread is None or self._lost is not None:
            raise RunLockedError(self._lost or f"{self._where} is not held: acquire it first")

    def release(self) -> None:
        """Stop the heartbeat and remove the lock if it is still ours; releasing twice is fine."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        if self._lost is None:
            self._swap(None)

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self) -> None:
        mine = self._mine.dump(self._where)
        for _ in range(TRIES):
            if self._store.create(LOCK, mine):
                return
            try:
                seen = self._store.read(LOCK)
            except MissingError:
                continue  # released in between
            if seen == mine:
                return  # our own create, whose reply was lost
            holder = parse_holder(seen, self._where)
            if not self._is_dead(holder, seen):
                self._refuse(holder)
            # The swap is for exactly the content that was judged dead: of two takers one finds it changed.
            if self._store.swap(LOCK, seen, mine):
                return
        raise RunLockedError(f"{self._where} changes hands all the time: stop the other coordinators, then try again")

    def _try_renewing(self) -> None:
        """If the storage cannot compare and swap, say so now and not when a block is to start again."""
        try:
            self._beat()
        except ShardError:
            # nobody else can have replaced it either
            with contextlib.suppress(ShardError):
                self._store.remove(LOCK)
            raise

    def _is_dead(self, holder: Holder, seen: bytes) -> bool:
        if holder.machine == self._mine.machine and not is_process(holder.pid):
            return True
        # A clock that runs ahead makes a dead owner look young for ever, hence abs().
        if abs(time.time() - holder.beat) <= holder.ttl:
            return False
        time.sleep(holder.ttl * WATCH_SHARE)
        try:
            return self._store.read(LOCK) == seen
        except MissingError:
            return True  # the swap will fail, and the next try creates it

    def _refuse(self, holder: Holder) -> NoReturn:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.since))
        raise RunLockedError(
            f"{self._store.url} is used by {holder.owner!r} on host {holder.host!r}, pid {holder.pid}, since {since}: "
            f"wait for it or stop it there; {self._when_free(holder)}"
        )

    def _when_free(self, holder: Holder) -> str:
        if holder.machine == self._mine.machine:
            return "the run is free as soon as that process ends"
        return (
            f"that process cannot be seen from here, so after a crash the run is free only {holder.ttl:g} s after its "
            f"last heartbeat, and whoever takes it then watches for {holder.ttl * WATCH_SHARE:g} s more"
        )

    def _beat_on(self) -> None:
        while not self._stop.wait(self._mine.ttl / BEATS_PER_TTL):
            # Out of reach for a while is no loss: nobody can have taken the lock that nobody can reach.
            with contextlib.suppress(ShardError):
                if not self._beat():
                    return

    def _beat(self) -> bool:
        """Renew the heartbeat; False when the lock is no longer ours."""
        new = replace(self._mine, beat=time.time())
        if not self._swap(new.dump(self._where)):
            self._lost = f"{self._where} was taken over by another coordinator: this one must stop"
            return False
        self._mine = new
        return True

    def _swap(self, new: bytes | None) -> bool:
        """Replace the lock if it is ours; one of our own heartbeats may be there whose reply was lost."""
        for _ in range(TRIES):
            if self._store.swap(LOCK, self._mine.dump(self._where), new):
                return True
            ours = self._ours()
            if ours is None:
                return False
            self._mine = ours
        raise ShardError(f"{self._where} refuses to be replaced: see whether its storage compares and swaps")

    def _ours(self) -> Holder | None:
        """The lock as it is, if we hold it."""
        try:
            seen = self._store.read(LOCK)
        except MissingError:
            return None
        try:
            holder = parse_holder(seen, self._where)
        except ShardError:
            return None  # we write no damaged one
        return holder if holder.token == self._mine.token else None
