"""What tells the copies of a run apart: each folder in which blocks are trained is a place with a name."""

import re
import secrets
import socket
from contextlib import suppress

from dbtrain.errors import ShardError
from dbtrain.run.prepare import versions
from dbtrain.shards.manifest import MANIFEST, Manifest
from dbtrain.shards.storage.errors import translate
from dbtrain.shards.storage.store import Store

PLACE = "place.json"
"""File in a run's directory: the name of this copy, and the mark of the folder that it was given in."""


def place_of(run: Store) -> str:
    """Name of this copy of a run, such as ``ada-3f9c2a``: the host that named it, and a random number.

    The name stays with the folder. A folder that was copied, with the name in it, is another place, and gets
    another name: its run.json is another file of the file system, changed last when it was copied.

    Raises:
        ShardError: the folder cannot be read or written.
    """
    mark = _mark(run)
    with suppress(ShardError):
        found = run.read_json(PLACE) if run.exists(PLACE) else None
        if isinstance(found, dict) and found.get("mark") == mark and isinstance(found.get("place"), str):
            return str(found["place"])
    place = f"{_host()}-{secrets.token_hex(3)}"
    keep_place(run, place)
    return place


def keep_place(run: Store, place: str) -> None:
    """Give this copy of a run a name, which stays until run.json is another file.

    Raises:
        ShardError: the folder cannot be read or written.
    """
    run.write_json(PLACE, {"place": place, "mark": _mark(run)})


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().split(".")[0]) or "host"


def _mark(run: Store) -> str:
    """A mark that changes when the folder is copied, however exactly, but not when its host is renamed."""
    if not run.is_local:
        return f"{run.url} {run.version(MANIFEST)}"
    try:
        state = (run.path / MANIFEST).stat()
    except OSError as err:
        raise translate(err, "look at", run.where(MANIFEST)) from err
    # the time of the last change of the inode, which no tool that copies can set
    return f"{state.st_ino} {state.st_ctime_ns}"


def other_versions(manifest: Manifest) -> str | None:
    """How this machine's versions differ from those that the run was sealed with, in words; None if equal."""
    here, sealed = versions(), manifest.versions
    differing = [
        f"{name} {here[name]}, not {sealed[name]}" for name in here if sealed.get(name, here[name]) != here[name]
    ]
    if not differing:
        return None
    return (
        f"this place has {', '.join(differing)}, which the run was sealed with: its blocks train here, and their last "
        "bits may differ from those of other places"
    )
