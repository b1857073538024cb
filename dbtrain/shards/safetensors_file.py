"""Tensors and one sealed record in a safetensors file: the same bytes for the same content, and none that lie."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.method.content import content_hash
from dbtrain.shards.checksummed_json import parse_json, seal, unseal
from dbtrain.shards.storage.errors import damaged, one_line, short

FORMAT_VERSION = 1

HEADER_LIMIT = 100_000_000
"""Bytes; safetensors itself refuses longer headers."""

RECORD_KEY = "dbtrain"
"""Metadata key of the sealed record; beside it is only ``format: pt``, which Hugging Face readers insist on."""

PICKLE_PROTOCOLS = range(2, 6)
ZIP_MAGIC = b"PK\x03\x04"


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def pack(tensors: Mapping[str, Tensor], record: Mapping[str, Any], where: str) -> bytes:
    """A safetensors file of the tensors (any shapes, moved to the CPU) whose metadata hold the sealed record.

    Raises:
        ShardError: a tensor has a dtype or layout that safetensors cannot hold, or the record is not JSON.
    """
    plain = _plain(tensors)
    sealed = seal({**record, "content": content_hash(plain)}, FORMAT_VERSION, where)
    try:
        raw = safetensors.torch.save(plain)
    except Exception as err:  # ValueError, KeyError, RuntimeError or SafetensorError, as the tensors are at fault
        raise ShardError(f"{where} cannot hold these tensors: {one_line(err)}; use dense, real tensors") from err
    # The metadata are put in here: the library writes them in an order that changes from process to process.
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps({"__metadata__": {RECORD_KEY: sealed.decode(), "format": "pt"}, **header}, separators=(",", ":"))
    padded = text.encode() + b" " * (-len(text.encode()) % 8)
    return b"".join([len(padded).to_bytes(8, "little"), padded, memoryview(raw)[8 + length :]])


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense CPU tensors, sorted by name, no two of which share memory (tied weights are written twice)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.layout != torch.strided:
            raise ShardError(f"tensor {name!r} is {tensor.layout}; only dense tensors go into a shard, use to_dense()")
        tensor = tensor.cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return plain


def unpack(data: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a file that :func:`pack` wrote; both are exactly what was written.

    Raises:
        DamagedError: it is a pickle, a zip, torn, flipped, hostile, or not written by dbtrain.
        ShardError: it is undamaged, but of another format version.
    """
    sealed = _sealed_record(data, where)
    record = unseal(sealed.encode("utf-8", "surrogatepass"), FORMAT_VERSION, f"{where} (metadata)")
    try:
        tensors = safetensors.torch.load(data)
        found = content_hash(tensors)
    except Exception as err:  # hostile bytes: SafetensorError, but also whatever torch says to a strange dtype
        damaged(where, one_line(err))
    if found != record.pop("content", None):
        damaged(where, "the tensors do not match the hash in its metadata (a flipped bit)")
    return tensors, record


def _sealed_record(data: bytes, where: str) -> str:
    """The record's text, after every check that needs no library."""
    refuse_pickle(data, where)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, HEADER_LIMIT):
        damaged(where, f"{len(data)} bytes cannot hold a safetensors header of {length} bytes")
    header = parse_json(data[8 : 8 + length], where)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    record = metadata.get(RECORD_KEY) if isinstance(metadata, dict) else None
    if not isinstance(record, str):
        damaged(where, f"no {RECORD_KEY!r} record in its metadata {short(metadata)}, so dbtrain did not write it")
    return record


def refuse_pickle(data: bytes, where: str) -> None:
    """Say so by name; the ninth byte tells a pickle from a safetensors header whose length happens to look like one."""
    is_pickle = len(data) > 1 and data[0] == 0x80 and data[1] in PICKLE_PROTOCOLS and data[8:9] != b"{"
    if is_pickle or data.startswith(ZIP_MAGIC):
        kind = "pickle" if is_pickle else "zip (a pickle of torch.save inside)"
        damaged(where, f"it is a {kind}, dbtrain never reads those")
