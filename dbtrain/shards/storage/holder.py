"""Who holds a run's lock: the content of LOCK.json."""

import contextlib
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from dbtrain.errors import ShardError
from dbtrain.shards.checksummed_json import Fields, seal, unseal
from dbtrain.shards.storage.errors import DamagedError

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
        found = Fields(unseal(data, VERSION, where), where)
        holder = Holder(
            owner=found.text("owner"),
            host=found.text("host"),
            machine=found.text("machine"),
            pid=found.integer("pid", low=1),
            token=found.text("token"),
            since=found.number("since"),
            beat=found.number("beat"),
            ttl=found.number("ttl"),
        )
        if not 0 < holder.ttl <= TIME_LIMIT_S or not 0 <= holder.since <= TIME_LIMIT_S:
            found.reject("ttl", f"positive, and since={holder.since} a time")
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
