"""Put the blocks together: a directory of links to the shards and an index of names. No tensor is copied or changed."""

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dbtrain.errors import IncompleteRunError, ShardError
from dbtrain.shards.checkpoint import Checkpoints, Loaded, shard_name, step_name
from dbtrain.shards.faults import damaged
from dbtrain.shards.format import decode, decode_codebook, sha256, tensor_hash
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.sealed import Fields, seal, unseal
from dbtrain.shards.store import Store

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
CODEBOOK = "codebook.safetensors"
MERGED_VERSION = 1

Weights = Literal["ema", "model"]


@dataclass(frozen=True)
class MergeResult:
    """What was merged."""

    path: str
    blocks: list[tuple[int, int, float | None, str]]
    """Of each block: number, step, loss at the commit, SHA-256 of its shard."""
    tensors: int
    parameters: int


def shard_file(block: int, blocks: int) -> str:
    """File of a block in the merged directory, named as Hugging Face names shards."""
    return f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"


def merge(run: Store, *, prefer: Weights = "ema", out: str = "merged") -> MergeResult:
    """Merge the newest whole checkpoint of every block.

    Args:
        prefer: averaged weights, or the last ones; the last ones where there is no average.
        out: directory below the run; one that is there is replaced.

    Raises:
        IncompleteRunError: blocks have no checkpoint or are not finished; all of them are named.
        ShardError: something does not match or is damaged.
    """
    manifest = read_manifest(run)
    check_codebook(run, manifest)
    loaded = _newest(run, manifest, prefer)
    staging = f"{out}.{secrets.token_hex(4)}.partial"
    try:
        result = _assemble(run, manifest, loaded, staging)
        run.move(staging, out)
    finally:
        run.remove(staging)
    return MergeResult(run.where(out), *result)


def check_codebook(run: Store, manifest: dict[str, Any]) -> Tensor | None:
    """The codebook of a run, verified; None if it has none.

    Raises:
        ShardError: it is missing, damaged, or not the one in run.json.
    """
    expected = manifest["codebook_hash"]
    if not expected:
        return None
    codes = decode_codebook(run.read(CODEBOOK), run.where(CODEBOOK))
    found = tensor_hash(codes)
    if found != expected:
        raise ShardError(
            f"{run.where(CODEBOOK)} is not the codebook of this run: its hash is {found[:12]}, run.json says "
            f"{expected[:12]}; restore the file that belongs to the run"
        )
    return codes


def _newest(run: Store, manifest: dict[str, Any], prefer: Weights) -> list[tuple[Loaded, Weights]]:
    found, missing, skipped = [], [], []
    total = manifest["config"]["training"]["steps"]
    for block in range(len(manifest["plan"])):
        checkpoints = Checkpoints(run.child("blocks", f"{block:02d}"), plan_identity(manifest, block))
        loaded = checkpoints.newest(skipped.append, ("model", "ema"))
        if loaded is None or loaded.step < total:
            at = "has no checkpoint" if loaded is None else f"is at step {loaded.step} of {total}"
            missing.append(f"block {block} {at}")
            continue
        found.append((loaded, prefer if prefer in loaded.parts else "model"))
    if missing:
        told = "".join(f" ({line})" for line in skipped)
        raise IncompleteRunError(f"{'; '.join(missing)}: run dbtrain train again, it continues only these{told}")
    return found  # type: ignore[return-value]


def _assemble(
    run: Store, manifest: dict[str, Any], loaded: list[tuple[Loaded, Weights]], staging: str
) -> tuple[list[tuple[int, int, float | None, str]], int, int]:
    weight_map: dict[str, str] = {}
    rows, size, parameters = [], 0, 0
    for block, (checkpoint, role) in enumerate(loaded):
        name = shard_file(block, len(loaded))
        source = f"blocks/{block:02d}/{step_name(checkpoint.step)}/{shard_name(role)}"
        run.copy(source, f"{staging}/{name}")
        for tensor_name, tensor in checkpoint.parts[role].items():
            if tensor_name in weight_map:
                raise ShardError(f"{tensor_name} is in block {block} and in {weight_map[tensor_name]}: mend the plan")
            weight_map[tensor_name] = name
            size, parameters = size + tensor.nbytes, parameters + tensor.numel()
        digest = checkpoint.commit.files[shard_name(role)]["sha256"]
        rows.append((block, checkpoint.step, checkpoint.commit.loss, digest))
    if manifest["codebook_hash"]:
        run.copy(CODEBOOK, f"{staging}/{CODEBOOK}")
    run.write_json(f"{staging}/{INDEX}", {"metadata": {"total_size": size}, "weight_map": weight_map})
    shards = [
        {"block": b, "step": s, "sha256": d, "file": shard_file(b, len(loaded)), "weights": loaded[b][1]}
        for b, s, _, d in rows
    ]
    config = {**manifest, "shards": shards}
    run.write(f"{staging}/{CONFIG}", seal(config, MERGED_VERSION, run.where(CONFIG)))
    return rows, len(weight_map), parameters


def read_config(merged: Store) -> dict[str, Any]:
    """config.json of a merged model: the run's manifest and its ``shards``.

    Raises:
        ShardError: it is missing or damaged.
    """
    if not merged.exists(CONFIG):
        raise ShardError(f"{merged.url} is no merged model: it has no {CONFIG}; run dbtrain merge first")
    where = merged.where(CONFIG)
    body = unseal(merged.read(CONFIG), MERGED_VERSION, where)
    Fields(body, where).items("shards")
    return body


def load_block(merged: Store, block: int) -> dict[str, Tensor]:
    """Tensors of one block by their global names, verified.

    Raises:
        ShardError: the shard or the index is missing, damaged, or they do not agree.
    """
    config = read_config(merged)
    if not 0 <= block < len(config["shards"]):
        raise ShardError(f"{merged.url} has no block {block}: its blocks are 0 to {len(config['shards']) - 1}")
    row = config["shards"][block]
    name, where = row["file"], merged.where(row["file"])
    data = merged.read(name)
    if sha256(data) != row["sha256"]:
        damaged(where, "its SHA-256 is not what config.json says")
    tensors = decode(data, where=where).tensors
    weight_map = Fields(merged.read_json(INDEX), merged.where(INDEX)).mapping("weight_map")
    if {n for n, file in weight_map.items() if file == name} != set(tensors):
        damaged(merged.where(INDEX), f"its names are not those in {name}")
    return tensors
