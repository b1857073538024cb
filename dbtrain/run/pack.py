"""Put blocks of a run, as far as they are trained, into one file that can be carried to another place."""

import os
import posixpath
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial

from dbtrain.errors import ShardError
from dbtrain.run.gather_sources import copy_of
from dbtrain.run.run import Run, RunBlock
from dbtrain.shards.checkpoint import Commit
from dbtrain.shards.commit import COMMIT, dump_commit
from dbtrain.shards.copies import CheckpointCopy
from dbtrain.shards.manifest import MANIFEST
from dbtrain.shards.packed_file import Entry, entry_name, is_packed, write_packed
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import FULL, MissingError
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Bytes, Count, silent


@dataclass(frozen=True)
class Packed:
    """What was packed."""

    url: str
    sha256: str
    """SHA-256 of the whole file, as ``sha256sum`` prints it."""
    commits: dict[int, Commit]
    """The commit that was packed of each block."""


def pack(
    run: Run, to: str, numbers: Collection[int] | None = None, weights_only: bool = False, count: Count = silent
) -> Packed:
    """Write the newest checkpoint of each block into a file, each verified on its way.

    The run may be training meanwhile. A file of that name is replaced in one step, if it is a packed one.

    Args:
        run: the run.
        to: path or URL of the file.
        numbers: numbers of the blocks; None for all that have a checkpoint.
        weights_only: leave out the optimizer's states, which are needed only to train the block further.
        count: is told how far it has come.

    Raises:
        ConfigError: there is no such block.
        ShardError: a block has no checkpoint, is damaged, or is not done and asked for by its weights alone;
            or the file cannot be written, or its name is that of something else.
    """
    folder, name = _target(to)
    copies = {}
    for block in run.chosen(numbers):
        copy = _copy(block, weights_only)
        if copy is not None:
            copies[block.number] = copy
        elif numbers is not None:
            raise ShardError(f"block {block.number} of {run.store.url} has no checkpoint yet: train it here first")
    if not copies:
        raise ShardError(f"no block of {run.store.url} has a checkpoint yet: train one here first")
    try:
        digest = write_packed(folder, name, _contents(run, copies, count))
    except MissingError as err:
        raise ShardError(
            f"{err}; if the run is training, a newer checkpoint has replaced it meanwhile: run the same command again"
        ) from err
    except ShardError as err:
        if getattr(err.__cause__, "errno", None) not in FULL:
            raise
        raise ShardError(
            f"cannot write {folder.where(name)}: the disk is full; free space there, or give --to another place, then "
            "run the same command again"
        ) from err
    return Packed(folder.where(name), digest, {block: copy.commit for block, copy in copies.items()})


def _target(to: str) -> tuple[Store, str]:
    url = Store(to).url
    parent, name = posixpath.split(url)
    folder = Store(parent)
    if os.path.isdir(url) or folder.exists(name) and not is_packed(folder, name):
        raise ShardError(f"{url} exists and is no packed file: give --to another name")
    return folder, name


def _copy(block: RunBlock, weights_only: bool) -> CheckpointCopy | None:
    copy = copy_of(block)
    if copy is None:
        return None
    copy.check(block.identity)
    if not weights_only:
        return copy
    if not block.done:
        raise ShardError(
            f"block {block.number} is at step {copy.commit.step} of {block.steps}, and nobody could train it on from "
            "its weights alone: leave --weights-only out, or train it to its end first"
        )
    files = {name: record for name, record in copy.commit.files.items() if not name.startswith("optim.")}
    return replace(copy, commit=replace(copy.commit, files=files))


def _contents(run: Run, copies: dict[int, CheckpointCopy], count: Count) -> dict[Entry, Callable[[], Iterable[bytes]]]:
    """The entries, run.json first and each COMMIT.json before its shards."""
    progress = Bytes(sum(copy.size for copy in copies.values()), "MiB packed", count)
    contents = dict([_json_entry(MANIFEST, run.store.read(MANIFEST))])
    for block, copy in copies.items():
        name = entry_name(block, copy.commit.step, COMMIT)
        contents |= [_json_entry(name, dump_commit(copy.commit, name))]
        for file, record in copy.commit.files.items():
            entry = Entry(entry_name(block, copy.commit.step, file), record["size"], record["sha256"])
            contents[entry] = partial(copy.content, file, progress.tick)
    return contents


def _json_entry(name: str, data: bytes) -> tuple[Entry, Callable[[], Iterable[bytes]]]:
    return Entry(name, len(data), sha256(data)), lambda: [data]
