"""Reading a merged model: everything is checked against config.json, which is sealed."""

from typing import Any

from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.method.content import tensor_hash
from dbtrain.shards.checksummed_json import Fields, parse_json, unseal
from dbtrain.shards.commit import FileRecord, parse_files
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.format import check_identity, decode, decode_codebook
from dbtrain.shards.manifest import check_manifest, plan_identity
from dbtrain.shards.safetensors_file import sha256
from dbtrain.shards.storage.errors import MissingError, damaged, short
from dbtrain.shards.storage.store import Store

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CODEBOOK = "codebook.safetensors"
VERSION = 1


def shard_name(block: int, blocks: int) -> str:
    """File of a block by the Hugging Face convention, which counts from one: block 0 of 3 is model-00001-of-00003."""
    return f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"


def read_config(merged: Store) -> dict[str, Any]:
    """config.json of a merged model: the fields of run.json, ``blocks`` (block, step, loss, role, file), ``files``.

    Raises:
        ShardError: there is no merged model, or config.json is damaged.
    """
    where = merged.where(CONFIG)
    try:
        data = merged.read(CONFIG)
    except MissingError as err:
        raise MissingError(f"{merged.url} holds no merged model (no {CONFIG}): run the merge first") from err
    config = unseal(data, VERSION, where)
    check_manifest(config, where)
    found = Fields(config, where)
    files, blocks = parse_files(found.mapping("files"), where), found.items("blocks")
    if len(blocks) != len(config["plan"]) or INDEX not in files:
        damaged(
            where, f"{len(blocks)} blocks and files {short(list(files))} do not fit a plan of {len(config['plan'])}"
        )
    for block, entry in enumerate(blocks):
        record = Fields(entry, where)
        record.integer("step")
        if record.integer("block") != block or record.text("file") not in files or record.text("role") == "optim":
            damaged(where, f"the entry of block {block} is {short(entry)}")
    return config


def load_block(merged: Store, block: int) -> dict[str, Tensor]:
    """Parameters of one block, CPU tensors by global name, verified by hash, identity and index.

    Raises:
        ShardError: no such block, or anything in the merged directory that this block needs is damaged or foreign.
    """
    config = read_config(merged)
    expected = plan_identity(config, block)
    entry, where = config["blocks"][block], merged.where(config["blocks"][block]["file"])
    listed = _listed(merged, config, entry["file"])
    shard = decode(_verified(merged, config, entry["file"]), where=where)
    check_identity(shard.identity, expected, where)
    if shard.step != entry["step"] or shard.role != entry["role"]:
        damaged(
            where, f"it holds {shard.role!r} of step {shard.step}, {CONFIG} says {entry['role']!r} of {entry['step']}"
        )
    if listed != set(shard.tensors):
        odd = sorted(listed ^ set(shard.tensors))
        damaged(merged.where(INDEX), f"it and {entry['file']} differ in {len(odd)} tensors, first {short(odd[0])}")
    refuse_non_finite(shard.tensors, where)
    return shard.tensors


def load_codebook(merged: Store) -> Tensor | None:
    """The codebook, (V, D) float32, or None if the run has none; ShardError if it is not the one of the run."""
    config = read_config(merged)
    if not config["codebook_hash"]:
        return None
    return checked_codebook(_verified(merged, config, CODEBOOK), config["codebook_hash"], merged.where(CODEBOOK))


def checked_codebook(data: bytes, codebook_hash: str, where: str) -> Tensor:
    """Codes (V, D) float32 of a codebook file; ShardError unless their hash is the given one."""
    codes = decode_codebook(data, where)
    found = tensor_hash(codes)
    if found != codebook_hash:
        raise ShardError(f"{where} has hash {found}, the run was trained with {codebook_hash}: restore the run's own")
    return codes


def _listed(merged: Store, config: dict[str, Any], file: str) -> set[str]:
    """Names of the tensors that the index puts into a file."""
    where = merged.where(INDEX)
    weight_map = Fields(parse_json(_verified(merged, config, INDEX), where), where).mapping("weight_map")
    return {name for name, place in weight_map.items() if place == file}


def _verified(merged: Store, config: dict[str, Any], name: str) -> bytes:
    """Content of a file of the merged directory, of the size and hash in config.json."""
    data, where = merged.read(name), merged.where(name)
    record: FileRecord | None = config["files"].get(name)
    if record is None or len(data) != record["size"] or sha256(data) != record["sha256"]:
        damaged(where, f"its {len(data)} bytes are not those recorded in {CONFIG}")
    return data
