"""What a run has learnt so far: its newest commits as one model, while it trains or before it is done.

Workers remove old commits when they make new ones, and may do so while the old ones are read here. So
commits are linked beside the run before they are read; or, where nothing may be written into the run, they
are copied a block at a time, and looked for again if they went meanwhile.
"""

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from dbtrain.errors import ShardError
from dbtrain.run.merge import (
    BUILDING,
    MergeResult,
    Piece,
    merge,
    on_standard_error,
    planned,
    put_in_place,
    remove_leftovers,
    so_far,
)
from dbtrain.run.run import MERGED, WEIGHTS, Run, RunBlock
from dbtrain.shards.commit import COMMIT, parse_commit, step_name
from dbtrain.shards.frozen import FROZEN
from dbtrain.shards.manifest import MANIFEST
from dbtrain.shards.merged_directory import CODEBOOK, MergedDirectory
from dbtrain.shards.packed_file import pieces, verified
from dbtrain.shards.storage.errors import DamagedError, MissingError
from dbtrain.shards.storage.store import Store

TRIES = 100
"""How often newer commits of a block may come while older ones are linked or copied."""


def merge_newest(
    run: Run, check: Callable[[Run, Store], None], tell: Callable[[str], None] = on_standard_error
) -> MergeResult:
    """Merge the newest verified checkpoints of blocks that need not be done into ``merged`` of the run.

    Their files are linked first, and so they stay while they are read; no worker waits.

    Args:
        run: the run, which may be training.
        check: gets a run that holds only what was merged, and the directory of the merged model; raises if
            that is not to become the merged model.
        tell: gets a line for each damaged checkpoint that is passed over.

    Raises:
        ShardError: a block has no checkpoint, or none that verifies; the storage fails; what `check` raises.
    """
    remove_leftovers(run.store)
    folder = f"{BUILDING}{secrets.token_hex(8)}.held"
    copy = Run(run.store.child(folder))

    def as_of_run(text: str) -> str:
        return text.replace(copy.store.url, run.store.url)

    try:
        _hold(run, folder)
        result = merge(copy, partial(check, copy), now=True, tell=lambda line: tell(as_of_run(line)))
        put_in_place(run.store, f"{folder}/{MERGED}")
    except ShardError as error:
        raise ShardError(as_of_run(str(error))) from error
    finally:
        with suppress(ShardError):
            run.store.remove(folder)
    return replace(result, path=run.merged.url)


def _hold(run: Run, folder: str) -> None:
    for name in (MANIFEST, CODEBOOK, FROZEN):
        if run.store.exists(name):
            run.store.write(f"{folder}/{name}", run.store.read(name))
    for block in run.blocks:
        _hold_block(block, folder)


def _hold_block(block: RunBlock, folder: str) -> None:
    """Link a block's commits, newest first, until none went meanwhile or the newest was whole."""
    for _ in range(TRIES):
        steps = block.checkpoints.steps()
        linked = [step for step in reversed(steps) if _linked(block, step, folder)]
        if linked[:1] == steps[-1:] or block.checkpoints.steps() == steps:
            return
    raise _too_fast(block)


def _linked(block: RunBlock, step: int, folder: str) -> bool:
    """Link a commit's weights; False if they are damaged, or were removed meanwhile."""
    store, name = block.run.store, f"{block.path}/{step_name(step)}"
    if store.exists(f"{folder}/{name}/{COMMIT}"):
        return True  # linked by an earlier try
    with suppress(MissingError, DamagedError):
        record = store.read(f"{name}/{COMMIT}")
        commit = parse_commit(record, store.where(f"{name}/{COMMIT}"))
        for file in filter(None, map(commit.file_of, WEIGHTS)):
            store.remove(f"{folder}/{name}/{file}")
            store.copy(f"{name}/{file}", f"{folder}/{name}/{file}")
        store.write(f"{folder}/{name}/{COMMIT}", record)
        return True
    return False


@contextmanager
def newest_model(run: Run) -> Iterator[MergedDirectory]:
    """A merged model of every block's newest checkpoint that verifies, in a folder for temporary files.

    Nothing is written into the run.

    Raises:
        ShardError: a block has no checkpoint, or none that verifies; or the temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="dbtrain-now-") as folder:
        target = Store(folder)
        _, files = planned(run, partial(_copied_out, run.store, target), True, on_standard_error)
        for name, data in files.items():
            target.write(name, data)
        yield MergedDirectory(target)


def _copied_out(store: Store, target: Store, block: RunBlock, skip: Callable[[str], None]) -> Piece | None:
    """A block's newest checkpoint, copied; another is chosen if newer commits replaced it meanwhile."""
    for _ in range(TRIES):
        before, skipped = block.checkpoints.steps(), list[str]()
        try:
            piece = so_far(block, skipped.append)
            if piece:
                _copy(store, piece, target)
        except ShardError:
            if block.checkpoints.steps() == before:
                raise
            continue
        if piece or block.checkpoints.steps() == before:
            for line in skipped:
                skip(line)
            return piece
    raise _too_fast(block)


def _copy(store: Store, piece: Piece, target: Store) -> None:
    size, where = piece.record["size"], store.where(piece.source)
    read = partial(store.read_range, piece.source)
    target.write_stream(piece.file, lambda: verified(pieces(read, size), size, piece.record["sha256"], where))


def _too_fast(block: RunBlock) -> ShardError:
    return ShardError(
        f"{block.name} of {block.run.store.url} replaced its commits {TRIES} times while they were read: raise "
        "training.checkpoint_every, or wait until the block is done"
    )
