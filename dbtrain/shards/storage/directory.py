"""The directory of a run: made for a command, taken away again if nothing is left in it;
and paths that are none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from dbtrain.errors import ConfigError, ShardError
from dbtrain.shards.manifest import MANIFEST
from dbtrain.shards.storage.local import flock_path
from dbtrain.shards.storage.lock import LOCK
from dbtrain.shards.storage.store import Store

SHOWN = 8
"""Runs that a message names."""


@contextmanager
def run_directory(run: Store) -> Iterator[None]:
    """Make the directory of a run and those above it; at the end remove those of them that are empty.

    An object store has no directories, and one that was there before is not this command's to remove.

    Raises:
        ConfigError: the path leads through a file, a link to nowhere, or another run.
        ShardError: it cannot be made.
    """
    if run.is_local:
        _check_place(run.path)
    made = _missing(run.path) if run.is_local else []
    try:
        run.makedirs()
        yield
    finally:
        _remove_empty(made)


def check_run_path(run: Store) -> None:
    """Say what a path is where a run is wanted and this is none.

    An object store, and a directory that a command is preparing, are left to whoever reads the run.

    Raises:
        ShardError: it does not exist, is a file or a link that leads nowhere, or lies above or in a run.
    """
    if (
        not run.is_local
        or os.path.isdir(path := run.path)
        and any(os.path.exists(path / name) for name in (MANIFEST, LOCK))
    ):
        return
    raise ShardError(f"{path} is not a run directory: {_instead(path)}")


def _instead(path: Path) -> str:
    """What a path is that is no run, and what to give instead."""
    above = next((folder for folder in path.parents if os.path.isfile(folder / MANIFEST)), None)
    if _leads_nowhere(path):
        return f"it is a link to {os.readlink(path)}, which does not exist; repair the link or give the real path"
    if above is not None:
        return f"it is in the run {above}; give that"
    if path.suffix in (".yaml", ".yml") and os.path.isfile(path):
        return "it is a configuration file; give the directory of a run, which is out/name (by default runs/NAME)"
    if os.path.isfile(path):
        return "it is a file; give the directory of a run, which is out/name"
    if not os.path.exists(path):
        return "there is nothing of that name; check the path, which is out/name (by default runs/NAME)"
    with suppress(OSError):
        runs = sorted(child.name for child in path.iterdir() if os.path.isfile(child / MANIFEST))
        if runs:
            more = ", ..." if len(runs) > SHOWN else ""
            return f"it has no {MANIFEST}, but runs lie in it; give one of them: {', '.join(runs[:SHOWN])}{more}"
    return f"it has no {MANIFEST}; check the path, which is out/name"


def _leads_nowhere(path: Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _check_place(path: Path) -> None:
    """Refuse a run's path that leads through something that is no directory, or through another run."""
    for part in [path, *path.parents]:
        if _leads_nowhere(part):
            raise ConfigError(
                f"the run would lie at {path}, and {part} is a link to {os.readlink(part)}, which does not exist: make "
                "that directory, or choose another out="
            )
        if os.path.isfile(part):
            raise ConfigError(f"the run would lie at {path}, and {part} is a file: choose another out= or name=")
        if part != path and os.path.isfile(part / MANIFEST):
            raise ConfigError(
                f"the run would lie at {path}, inside of another run, {part}: choose an out= beside it, such as "
                f"out={part.parent}"
            )


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
