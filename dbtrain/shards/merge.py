"""Put the blocks together into one model: a directory of their shards that copies nothing it need not."""

import contextlib
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dbtrain.errors import ShardError
from dbtrain.shards.checkpoint import Checkpoints, Loaded
from dbtrain.shards.checksummed_json import seal
from dbtrain.shards.commit import FileRecord, step_name
from dbtrain.shards.format import Role
from dbtrain.shards.manifest import MANIFEST, plan_identity, read_manifest
from dbtrain.shards.merged_directory import (
    CODEBOOK,
    CONFIG,
    INDEX,
    VERSION,
    checked_codebook,
    load_block,
    load_codebook,
    read_config,
    shard_name,
)
from dbtrain.shards.portable import portable
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import MissingError
from dbtrain.shards.storage.store import Store

__all__ = ["MergeResult", "load_block", "load_codebook", "merge", "read_config"]


OUT = "merged"
"""Directory of the merged model, in the run's."""
WEIGHTS: tuple[Role, ...] = ("ema", "model")
"""What is merged: the first of these that a block has."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge made."""

    path: str
    blocks: list[tuple[int, int, float | None, str]]
    """(block, step, loss, SHA-256 of its shard), in the order of the blocks."""
    tensors: int
    parameters: int


@dataclass(frozen=True)
class _Piece:
    """One block's part of the merged model, verified."""

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


def read_back(merged: Store) -> None:
    """Raise ShardError unless every block and the codebook of a merged model can be read, with their hashes."""
    for row in read_config(merged)["blocks"]:
        load_block(merged, row["block"])
    load_codebook(merged)


def merge(run: Store, check: Callable[[Store], None] = read_back) -> MergeResult:
    """Merge each block's newest verified checkpoint, its averaged weights if it has them, into ``merged`` of the run.

    A line on standard error tells of each damaged checkpoint that is passed over.

    It is built beside and checked there; until then, and after a check that failed, an older merged model stays as it
    is. On a disk the two are exchanged in one step. In an object store, which has no such step, the old config.json
    goes first and the new one comes last, and without it there is no merged model.

    Args:
        run: directory of the run.
        check: raises if what lies in this directory is not to become the merged model.

    Raises:
        ShardError: blocks without a checkpoint of the last step (all of them in one message), a shard that belongs
            elsewhere, a codebook that is not the run's, a damaged run.json, or storage out of reach; and what `check`
            raises.
    """
    manifest = read_manifest(run)
    codebook = _read_codebook(run, manifest)
    pieces = _collect(run, manifest)
    index = _index(pieces)
    config = _config(manifest, pieces, index, codebook)
    # Not hidden, so that list() finds what a killed merge left behind.
    building = f"{OUT}.building-{secrets.token_hex(8)}"
    _remove_leftovers(run)
    try:
        _fill(run, building, pieces, index, codebook, config)
        check(run.child(building))
        if run.is_local:
            run.move(building, OUT)
        else:
            _publish(run, building, config)
    finally:
        with contextlib.suppress(ShardError):
            run.remove(building)
    return MergeResult(
        path=run.child(OUT).url,
        blocks=[(piece.block, piece.step, piece.loss, piece.record["sha256"]) for piece in pieces],
        tensors=sum(len(piece.sizes) for piece in pieces),
        parameters=sum(elements for piece in pieces for elements, _ in piece.sizes.values()),
    )


def _read_codebook(run: Store, manifest: Mapping[str, Any]) -> bytes | None:
    """The codebook file, whose real hash must be the one in run.json."""
    where, expected = run.where(CODEBOOK), manifest["codebook_hash"]
    if not expected:
        if run.exists(CODEBOOK):
            raise ShardError(f"{where} exists, but {MANIFEST} names no codebook: remove it, or use the run it is from")
        return None
    data = run.read(CODEBOOK)
    checked_codebook(data, expected, where)
    return data


def _collect(run: Store, manifest: Mapping[str, Any]) -> list[_Piece]:
    """Every block's newest checkpoint, or one error that names all blocks that have none."""
    pieces, missing = [], []
    skipped: dict[int, list[str]] = {}
    steps = int(manifest["config"]["training"]["steps"])
    blocks = range(len(manifest["plan"]))
    for block in blocks:
        piece = _piece(run, manifest, block, skipped.setdefault(block, []))
        if piece is None:
            missing.append(block)
        else:
            pieces.append(piece)
    if missing:
        names = ", ".join(f"{block}{_why(skipped[block])}" for block in missing)
        raise ShardError(
            f"cannot merge {run.url}: {len(missing)} of {len(blocks)} blocks have no good checkpoint: {names}; "
            "train those (the same train command continues only what is missing)"
        )
    short = [
        f"{piece.block} (step {piece.step}{_why(skipped[piece.block], '; ', '')})"
        for piece in pieces
        if piece.step < steps
    ]
    if short:
        raise ShardError(
            f"cannot merge {run.url}: {len(short)} of {len(blocks)} blocks have no good checkpoint of the last step, "
            f"{steps}: {', '.join(short)}; train those to their end (the same train command continues only those)"
        )
    return pieces


def _why(skipped: list[str], start: str = " (", end: str = ")") -> str:
    """What was found wrong with a block's checkpoints, as an addition to its number."""
    return f"{start}{'; '.join(skipped)}{end}" if skipped else ""


def _piece(run: Store, manifest: Mapping[str, Any], block: int, skipped: list[str]) -> _Piece | None:
    """The newest checkpoint of a block that verifies; what is passed over is told, and added to `skipped`."""

    def skip(line: str) -> None:
        skipped.append(line)
        print(line, file=sys.stderr)

    folder = f"blocks/{block:02d}"
    checkpoints = Checkpoints(run.child(folder), plan_identity(manifest, block))
    loaded = checkpoints.newest(skip, roles=WEIGHTS)
    if loaded is None:
        return None
    role = next(role for role in WEIGHTS if role in loaded.parts)
    return _describe(loaded, role, block, len(manifest["plan"]), folder)


def _describe(loaded: Loaded, role: Role, block: int, blocks: int, folder: str) -> _Piece:
    commit, name = loaded.commit, loaded.commit.file_of(role)
    assert name is not None, "a loaded role has a file"
    return _Piece(
        block=block,
        step=commit.step,
        loss=commit.loss,
        role=role,
        source=f"{folder}/{step_name(commit.step)}/{name}",
        file=shard_name(block, blocks),
        record=commit.files[name],
        sizes={key: (t.numel(), t.numel() * t.element_size()) for key, t in sorted(loaded.parts[role].items())},
    )


def _index(pieces: list[_Piece]) -> bytes:
    """The Hugging Face index; no name comes twice, because ``decode`` lets a block have only its own names."""
    sizes = [size for piece in pieces for _, size in piece.sizes.values()]
    weight_map = {name: piece.file for piece in pieces for name in piece.sizes}
    return (json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, indent=1) + "\n").encode()


def _config(manifest: Mapping[str, Any], pieces: list[_Piece], index: bytes, codebook: bytes | None) -> bytes:
    """config.json: the run, but for places on this machine, and the hash of every file beside it."""
    files = {piece.file: piece.record for piece in pieces}
    for name, data in ((INDEX, index), (CODEBOOK, codebook)):
        if data is not None:
            files[name] = FileRecord(size=len(data), sha256=sha256(data))
    blocks = [
        {"block": p.block, "step": p.step, "loss": p.loss, "role": p.role, "file": p.file, "sha256": p.record["sha256"]}
        for p in pieces
    ]
    return seal({**portable(manifest), "blocks": blocks, "files": files}, VERSION, CONFIG)


def _fill(run: Store, target: str, pieces: list[_Piece], index: bytes, codebook: bytes | None, config: bytes) -> None:
    """Write the merged directory, config.json last."""
    for piece in pieces:
        try:
            run.copy(piece.source, f"{target}/{piece.file}")
        except MissingError as err:
            raise ShardError(
                f"block {piece.block}: {run.where(piece.source)} vanished while merging, because its worker committed "
                "a newer step and removed old ones: run the merge again"
            ) from err
    if codebook is not None:
        run.write(f"{target}/{CODEBOOK}", codebook)
    run.write(f"{target}/{INDEX}", index)
    run.write(f"{target}/{CONFIG}", config)


def _publish(run: Store, building: str, config: bytes) -> None:
    """Put a checked model into the place of the old one in an object store: nothing is a model until the last put."""
    run.remove(f"{OUT}/{CONFIG}")
    run.remove(OUT)
    for name in run.child(building).list():
        if name != CONFIG:
            run.copy(f"{building}/{name}", f"{OUT}/{name}")
    run.write(f"{OUT}/{CONFIG}", config)


def _remove_leftovers(run: Store) -> None:
    """What killed merges left; a merge that runs at the same time fails with an error, and spoils nothing."""
    for name in run.list():
        if name.startswith(f"{OUT}.building-"):
            run.remove(name)
