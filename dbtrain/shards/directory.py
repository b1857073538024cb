"""The directory of a run: made for a command, and taken away again if the command leaves nothing in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from dbtrain.shards.local import flock_path
from dbtrain.shards.lock import LOCK
from dbtrain.shards.store import Store


@contextmanager
def run_directory(run: Store) -> Iterator[None]:
    """Make the directory of a run and those above it; at the end remove those of them that are empty.

    An object store has no directories, and one that was there before is not this command's to remove.

    Raises:
        ShardError: it cannot be made.
    """
    made = _missing(run.path) if run.is_local else []
    try:
        run.makedirs()
        yield
    finally:
        _remove_empty(made)


def _missing(path: Path) -> list[Path]:
    """A directory and those above it that are not there, the deepest first."""
    return list(takewhile(lambda directory: not os.path.exists(directory), [path, *path.parents]))


def _remove_empty(made: list[Path]) -> None:
    with suppress(OSError):
        if made and [path.name for path in made[0].iterdir()] == [flock_path(made[0] / LOCK).name]:
            flock_path(made[0] / LOCK).unlink()
    for directory in made:
        # it fails where anything is in there, such as the lock of a command that came meanwhile
        with suppress(OSError):
            directory.rmdir()
