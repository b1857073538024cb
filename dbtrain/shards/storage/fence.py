"""Who may commit to a block: its newest attempt; one that
was cut off may go on after its replacement started."""

import os
import socket
import time

from dbtrain.errors import FencedError, ShardError
from dbtrain.shards.checksummed_json import Fields, seal, unseal
from dbtrain.shards.storage.errors import MissingError
from dbtrain.shards.storage.store import Store

OWNER = "OWNER.json"
VERSION = 1
TRIES = 20
"""Claims that may be lost to others before giving up; attempts of a block are started one after another."""


def claim(store: Store, attempt: int, token: str) -> None:
    """Make this attempt the owner of the block directory ``store``;
    claiming again with the same token is fine.

    Args:
        attempt: number of the attempt, >= 0; the highest one owns the block.
        token: unique to this attempt's process, not empty.

    Raises:
        FencedError: an attempt with this number or a higher one, and another token, owns the block.
        ShardError: OWNER.json cannot be read or written.
    """
    if attempt < 0 or not token:
        raise ShardError(f"claim of {store.url}: attempt={attempt} must be >= 0 and token={token!r} not empty")
    mine = _record(attempt, token, store)
    for _ in range(TRIES):
        try:
            seen = store.read(OWNER)
        except MissingError:
            if store.create(OWNER, mine):
                return
            continue
        owner, owned_by, who = _parse(seen, store)
        if owned_by == token and owner == attempt:
            return
        if owned_by != token and owner >= attempt:
            raise FencedError(
                f"attempt {attempt} may not start on {store.url}: attempt {owner} ({who}) owns it; "
                f"start it as attempt {owner + 1} or let that one go on"
            )
        # Not a plain write: a slow claim of an old attempt must not undo that of a newer one.
        if store.swap(OWNER, seen, mine):
            return
    raise FencedError(f"attempt {attempt} lost {TRIES} claims of {store.url} to others: start one attempt at a time")


def newest_attempt(store: Store) -> int:
    """Number of the attempt that owns the block directory; 0 when nobody ever did.

    Raises:
        ShardError: OWNER.json cannot be read.
    """
    try:
        return _parse(store.read(OWNER), store)[0]
    except MissingError:
        return 0


def check(store: Store, token: str) -> None:
    """Return if the attempt with this token still owns the block.

    Raises:
        FencedError: another attempt owns it, or nobody does.
        ShardError: OWNER.json cannot be read.
    """
    try:
        owner, owned_by, who = _parse(store.read(OWNER), store)
    except MissingError as err:
        raise FencedError(f"nobody owns {store.url} ({OWNER} is missing): claim it before committing") from err
    if owned_by != token:
        raise FencedError(
            f"{store.url} is owned by attempt {owner} ({who}): this attempt commits nothing more and should exit"
        )


def _record(attempt: int, token: str, store: Store) -> bytes:
    fields = {"attempt": attempt, "token": token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return seal(fields, VERSION, store.where(OWNER))


def _parse(data: bytes, store: Store) -> tuple[int, str, str]:
    """Attempt, token, and who that is in words."""
    where = store.where(OWNER)
    owner = Fields(unseal(data, VERSION, where), where)
    who = f"host {owner.text('host')!r}, pid {owner.integer('pid')}"
    return owner.integer("attempt"), owner.text("token"), who
