"""Put the blocks together into one model: a directory of their shards,
by hard links on a disk and by copies within an object store."""

import contextlib
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.run.run import MERGED, Run, RunBlock
from dbtrain.shards.checkpoint import Loaded
from dbtrain.shards.commit import FileRecord, step_name
from dbtrain.shards.format import Role
from dbtrain.shards.frozen import FROZEN, decode_frozen
from dbtrain.shards.manifest import MANIFEST, Manifest
from dbtrain.shards.merged_directory import (
    CODEBOOK,
    CONFIG,
    INDEX,
    MergedBlock,
    MergedDirectory,
    checked_codebook,
    dump_config,
    shard_name,
)
from dbtrain.shards.portable import portable
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import MissingError
from dbtrain.shards.storage.store import Store

BUILDING = f"{MERGED}.building-"
"""Beginning of the names of directories in which merges are built. They are not hidden, so that list() finds
what a killed merge left behind."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge made."""

    path: str
    blocks: list[tuple[int, int, float | None, str]]
    """(block, step, loss, SHA-256 of its shard), in the order of the blocks."""
    tensors: int
    parameters: int
    progress: str
    """How far the blocks are trained, if they are not done."""


@dataclass(frozen=True)
class Piece:
    """One block's part of a merged model, verified."""

    block: int
    step: int
    loss: float | None
    role: Role
    source: str
    """Name of its shard in the run directory."""
    file: str
    """Name of its shard in the merged directory."""
    record: FileRecord
    sizes: dict[str, tuple[int, int]]
    """Elements and bytes of each tensor, by global name."""


Choose = Callable[[RunBlock, Callable[[str], None]], Piece | None]
"""(block, skip) -> the checkpoint of the block that is merged, or None; `skip` is told of each that is passed
over."""


def on_standard_error(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=sys.stderr)


def read_back(merged: Store) -> None:
    """Raise ShardError unless all blocks and all that they have in common can be read, with their hashes."""
    model = MergedDirectory(merged)
    for row in model.blocks:
        model.block(row.block)
    model.codebook()
    model.frozen()


def merge(
    run: Run,
    check: Callable[[Store], None] = read_back,
    now: bool = False,
    tell: Callable[[str], None] = on_standard_error,
) -> MergeResult:
    """Merge each block's newest verified checkpoint, its averaged weights if it has them,
    into ``merged`` of the run.

    It is built beside and checked there; until then, and after a check that failed, an older merged model
    stays as it is. On a disk the two are exchanged in one step. In an object store, which has no such step,
    the old config.json goes first and the new one comes last, and without it there is no merged model.

    Args:
        run: the run.
        check: raises if what lies in this directory is not to become the merged model. The command passes the
            comparison of `evaluation/verify.py`; the default only reads back.
        now: take blocks that are not done as far as they are; config.json then says so. Of a run that may be
            training use `merge_newest` (`run/newest.py`).
        tell: gets a line for each damaged checkpoint that is passed over.

    Raises:
        ShardError: blocks without a checkpoint of the last step (all of them in one message), a shard that
            belongs elsewhere, a codebook or frozen parts that are not the run's, a damaged run.json, or
            storage out of reach; and what `check` raises.
    """
    pieces, files = planned(run, so_far if now else whole, now, tell)
    store = run.store
    building = f"{BUILDING}{secrets.token_hex(8)}"
    remove_leftovers(store)
    try:
        _fill(store, building, pieces, files)
        check(store.child(building))
        put_in_place(store, building)
    finally:
        with contextlib.suppress(ShardError):
            store.remove(building)
    return MergeResult(
        path=run.merged.url,
        blocks=[(piece.block, piece.step, piece.loss, piece.record["sha256"]) for piece in pieces],
        tensors=sum(len(piece.sizes) for piece in pieces) + len(run.frozen),
        parameters=sum(elements for sizes in _all_sizes(pieces, run.frozen) for elements, _ in sizes.values()),
        progress=MergedDirectory(run.merged).progress,
    )


def planned(run: Run, choose: Choose, now: bool, tell: Callable[[str], None]) -> tuple[list[Piece], dict[str, bytes]]:
    """The blocks of a merged model, and the content of its other files, config.json last.

    Args:
        choose: the checkpoint of a block that is taken.
        now: take blocks that are not done.
        tell: gets a line for each checkpoint that is passed over.

    Raises:
        ShardError: the same as in :func:`merge`, but for what `check` raises.
    """
    common = _read_common(run)
    found = _collect(run, choose, now, tell)
    common[INDEX] = _index(found, run.frozen)
    return found, {**common, CONFIG: _config(run.manifest, found, common)}


def _read_common(run: Run) -> dict[str, bytes]:
    """What all blocks have in common, by file, whose real hashes must be those in run.json."""
    store, manifest = run.store, run.manifest
    common: dict[str, bytes] = {}
    kinds = ((CODEBOOK, manifest.codebook_hash, "codebook"), (FROZEN, manifest.frozen_hash, "frozen parts"))
    for name, expected, kind in kinds:
        if expected:
            common[name] = store.read(name)
        elif store.exists(name):
            raise ShardError(
                f"{store.where(name)} exists, but {MANIFEST} names no {kind}: remove it, or use the run it is from"
            )
    if CODEBOOK in common:
        checked_codebook(common[CODEBOOK], manifest.codebook_hash, store.where(CODEBOOK))
    if FROZEN in common:
        decode_frozen(common[FROZEN], manifest.frozen_hash, store.where(FROZEN))
    return common


def _collect(run: Run, choose: Choose, now: bool, tell: Callable[[str], None]) -> list[Piece]:
    """Every block's newest checkpoint, or one error that
    names all blocks that have none of their last step; none at all if `now`."""
    pieces, missing, behind = [], [], []
    for block in run.blocks:
        skipped: list[str] = []
        piece = choose(block, skipped.append)
        for line in skipped:
            tell(line)
        why = "; ".join(skipped)
        if piece is None:
            missing.append(f"{block.number} ({why})" if why else str(block.number))
        elif piece.step < block.steps and not now:
            behind.append(f"{block.number} (step {piece.step} of {block.steps}{'; ' if why else ''}{why})")
        else:
            pieces.append(piece)
    count = run.manifest.blocks
    if missing:
        raise ShardError(
            f"cannot merge {run.store.url}: {len(missing)} of {count} blocks have no good checkpoint: "
            f"{', '.join(missing)}; train those (the same train command continues only what is missing)"
        )
    if behind:
        raise ShardError(
            f"cannot merge {run.store.url}: {len(behind)} of {count} blocks have no good checkpoint of the last step: "
            f"{', '.join(behind)}; train those to their end (the same train command continues only those)"
        )
    return pieces


def whole(block: RunBlock, skip: Callable[[str], None]) -> Piece | None:
    """The newest checkpoint of a block that verifies. If it is not that of the last step, the note that
    the last one is whole is removed."""
    found = block.newest_weights(skip)
    return None if found is None else _describe(*found, block)


def so_far(block: RunBlock, skip: Callable[[str], None]) -> Piece | None:
    """The same as :func:`whole` for a run that may be training: nothing is written."""
    found = block.weights(skip)
    return None if found is None else _describe(*found, block)


def _describe(loaded: Loaded, role: Role, block: RunBlock) -> Piece:
    commit, name = loaded.commit, loaded.commit.file_of(role)
    assert name is not None, "a loaded role has a file"
    return Piece(
        block=block.number,
        step=commit.step,
        loss=commit.loss,
        role=role,
        source=f"{block.path}/{step_name(commit.step)}/{name}",
        file=shard_name(block.number, block.run.manifest.blocks),
        record=commit.files[name],
        sizes=_sizes(loaded.parts[role]),
    )


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (t.numel(), t.numel() * t.element_size()) for name, t in sorted(tensors.items())}


def _all_sizes(pieces: list[Piece], frozen: Mapping[str, Tensor]) -> list[dict[str, tuple[int, int]]]:
    return [*(piece.sizes for piece in pieces), _sizes(frozen)]


def _index(pieces: list[Piece], frozen: Mapping[str, Tensor]) -> bytes:
    """The Hugging Face index; no name comes twice, because
    ``decode`` lets a block have only its own names."""
    sizes = [size for part in _all_sizes(pieces, frozen) for _, size in part.values()]
    weight_map = {name: piece.file for piece in pieces for name in piece.sizes} | dict.fromkeys(sorted(frozen), FROZEN)
    return (json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, indent=1) + "\n").encode()


def _config(manifest: Manifest, pieces: list[Piece], common: Mapping[str, bytes]) -> bytes:
    """config.json: the run, but for places on this machine, and the hash of every file beside it."""
    files = {piece.file: piece.record for piece in pieces}
    for name, data in common.items():
        files[name] = FileRecord(size=len(data), sha256=sha256(data))
    rows = [MergedBlock(p.block, p.step, p.loss, p.role, p.file, p.record["sha256"]) for p in pieces]
    return dump_config(portable(manifest), rows, files)


def _fill(run: Store, target: str, pieces: list[Piece], files: Mapping[str, bytes]) -> None:
    """Write the merged directory: the blocks, then the other files in their order, config.json last."""
    for piece in pieces:
        try:
            run.copy(piece.source, f"{target}/{piece.file}")
        except MissingError as err:
            raise ShardError(
                f"block {piece.block}: {run.where(piece.source)} vanished while merging, because its worker committed "
                "a newer step and removed old ones: run the merge again"
            ) from err
    for name, data in files.items():
        run.write(f"{target}/{name}", data)


def put_in_place(run: Store, building: str) -> None:
    """Make a checked directory of a run its merged model; an older merged model is replaced.

    On a disk the two are exchanged in one step; in an object store nothing is a model until the last put.

    Raises:
        ShardError: the storage failed; the same merge can be made again.
    """
    if run.is_local:
        run.move(building, MERGED)
        return
    built = run.child(building)
    run.remove(f"{MERGED}/{CONFIG}")
    run.remove(MERGED)
    for name in built.list():
        if name != CONFIG:
            run.copy(f"{building}/{name}", f"{MERGED}/{name}")
    run.write(f"{MERGED}/{CONFIG}", built.read(CONFIG))


def remove_leftovers(run: Store) -> None:
    """Remove what killed merges left. A merge that runs at the same time fails, but damages nothing."""
    for name in run.list():
        if name.startswith(BUILDING):
            run.remove(name)
