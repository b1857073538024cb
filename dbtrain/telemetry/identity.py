"""The name by which trackers know a run again, whatever command or machine continues it."""

import secrets

from dbtrain.errors import ShardError
from dbtrain.shards.storage.store import Store

FILE = "tracked.json"


def tracked_as(run: Store) -> str:
    """A random name, made once and kept in the run's directory:
    a run that is removed and begun anew is another.

    Raises:
        ShardError: the file is no such name, or the directory cannot be written.
    """
    if not run.exists(FILE):
        run.write_json(FILE, {"identity": secrets.token_hex(6)})
    found = run.read_json(FILE)
    identity = found.get("identity") if isinstance(found, dict) else None
    if not isinstance(identity, str) or not identity.isalnum():
        raise ShardError(f"{run.where(FILE)} names no run for the trackers: remove it, and they begin a new series")
    return identity
