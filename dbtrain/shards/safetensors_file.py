"""Tensors and one sealed record in a safetensors file: equal bytes for equal content, and none that lie.

Neither way copies the file in memory: what is written are the tensors' own bytes, and what is read goes
straight into new tensors.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.method.content import content_hash
from dbtrain.shards.checksummed_json import parse_json, seal, unseal
from dbtrain.shards.side_by_side import HashBeside
from dbtrain.shards.storage.content import PIECE, BytesReader, Content, Reader
from dbtrain.shards.storage.errors import damaged, one_line, short

FORMAT_VERSION = 1

HEADER_LIMIT = 100_000_000
"""Bytes; safetensors itself refuses longer headers."""

RECORD_KEY = "dbtrain"
"""Metadata key of the sealed record; beside it is only ``format:
pt``, which Hugging Face readers insist on."""

PICKLE_PROTOCOLS = range(2, 6)
ZIP_MAGIC = b"PK\x03\x04"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""PyTorch's types by the names that safetensors gives them."""

DIGEST_SIZE = 64
"""Hex digits of a hash."""


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def as_file(tensors: Mapping[str, Tensor], record: Mapping[str, Any], where: str) -> Content:
    """A safetensors file of the tensors (any shapes, moved to the CPU) whose metadata hold the sealed record.

    The tensors must stay as they are until the file is written. The hash of their content, which stands in
    the header, is computed when the header is first asked for.

    Raises:
        ShardError: a tensor has a dtype or layout that safetensors cannot hold, or the record is not JSON.
    """
    plain = {name: _plain(name, tensors[name]) for name in sorted(tensors)}
    entries = _entries(plain, where)

    def head(content: str) -> bytes:
        sealed = seal({**record, "content": content}, FORMAT_VERSION, where)
        metadata = {"__metadata__": {RECORD_KEY: sealed.decode(), "format": "pt"}}
        text = json.dumps({**metadata, **entries}, separators=(",", ":")).encode()
        padded = text + b" " * (-len(text) % 8)
        return len(padded).to_bytes(8, "little") + padded

    # every hash is as long as every other, so that the tensors' place in the file is known before theirs
    size = len(head("0" * DIGEST_SIZE))
    return Content([_bytes_of(plain[name]) for name in entries], size, lambda: head(content_hash(plain)))


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A dense CPU tensor, the same one if it is that already."""
    if tensor.layout != torch.strided:
        raise ShardError(f"tensor {name!r} is {tensor.layout}; only dense tensors go into a shard, use to_dense()")
    return tensor.detach().cpu().contiguous()


def _entries(plain: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Any]]:
    """What the header says of each tensor, in the order of the file."""
    try:
        # of empty tensors the library tells its names of the types, and its order, which depends on both
        raw = safetensors.torch.save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in plain.items()})
    except Exception as err:  # ValueError, KeyError, RuntimeError or SafetensorError, as the tensors are at fault
        raise ShardError(f"{where} cannot hold these tensors: {one_line(err)}; use dense, real tensors") from err
    entries: dict[str, dict[str, Any]] = json.loads(raw[8:])
    end = 0
    for name, entry in entries.items():
        start, end = end, end + plain[name].numel() * plain[name].element_size()
        entry |= {"shape": list(plain[name].shape), "data_offsets": [start, end]}
    return entries


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a dense CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Destination(Protocol):
    """Where the tensors of a file come to lie when it is read."""

    def room(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """A new tensor, to be filled."""

    def fill(self, tensor: Tensor, take: Callable[[memoryview], object], settle: Callable[[], None]) -> None:
        """Fill a tensor of `room`.

        Args:
            tensor: the tensor.
            take: fills host memory with the next bytes of the file; they must stay as they are for now.
            settle: after it returns, memory that was filled before may be used again.
        """


class NewMemory:
    """Tensors that are read lie in host memory of their own."""

    def room(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """A new tensor, to be filled."""
        return torch.empty(shape, dtype=dtype)

    def fill(self, tensor: Tensor, take: Callable[[memoryview], object], settle: Callable[[], None]) -> None:
        """Read straight into the tensor."""
        take(_bytes_of(tensor))


@dataclass(frozen=True)
class Raw:
    """A file as it was read, of which nothing was judged yet but that it is a safetensors file of dbtrain."""

    tensors: dict[str, Tensor]
    sealed: str
    """Text of the record."""
    sha256: str
    """Hash of all bytes of the file; '' if it was not asked for."""


def read_raw(reader: Reader, where: str, to: Destination | None = None, hashed: bool = True) -> Raw:
    """Read a file of :func:`as_file` into new tensors and hash it on the way, once.

    Args:
        reader: the file, from its beginning.
        where: its name, for messages.
        to: where the tensors shall lie, by default in host memory.
        hashed: False for a file that was hashed before and has not changed since.

    Raises:
        DamagedError: it is a pickle, a zip, torn, hostile, or not written by dbtrain.
    """
    to = to or NewMemory()
    with HashBeside() as digest:

        def take(into: memoryview) -> memoryview:
            for start in range(0, len(into), PIECE):
                piece = into[start : start + PIECE]
                if reader.readinto(piece) < len(piece):
                    damaged(where, f"it ends before its {reader.size} bytes")
                if hashed:
                    digest.add(piece)
            return into

        start = bytes(take(memoryview(bytearray(min(9, reader.size)))))
        refuse_pickle(start, where)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or not 0 < length <= min(reader.size - 8, HEADER_LIMIT):
            damaged(where, f"{reader.size} bytes cannot hold a safetensors header of {length} bytes")
        header = parse_json(start[8:] + bytes(take(memoryview(bytearray(length - 1)))), where)
        sealed = sealed_record(header, where)
        tensors = {}
        for name, dtype, shape in layout(header, reader.size - 8 - length, where):
            tensors[name] = _room(to, shape, dtype, where)
            to.fill(tensors[name], take, digest.settle)
    return Raw(tensors, sealed, digest.hexdigest() if hashed else "")


def layout(header: Mapping[str, Any], size: int, where: str) -> Iterator[tuple[str, torch.dtype, list[int]]]:
    """Name, type and shape of each tensor in the file's order; they fill it without gap or overlap."""
    entries = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            damaged(where, f"its header says of {short(name)}: {short(entry)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and dtype in DTYPES and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
            damaged(where, f"its header says of {short(name)}: {short(entry)}")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            damaged(where, f"the bytes of {short(name)} are not as many as its shape {short(shape)} needs")
        entries.append((offsets[0], offsets[1], name, DTYPES[dtype], shape))
    entries.sort(key=lambda entry: entry[:2])
    ends = [0, *(entry[1] for entry in entries)]
    if [entry[0] for entry in entries] != ends[:-1] or ends[-1] != size:
        damaged(where, f"its tensors do not fill its {size} bytes of data one after the other")
    for _, _, name, dtype, shape in entries:
        yield name, dtype, shape


def _room(to: Destination, shape: list[int], dtype: torch.dtype, where: str) -> Tensor:
    try:
        return to.room(shape, dtype)
    except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of the file
        raise
    except (RuntimeError, TypeError, OverflowError) as err:  # a shape beyond all numbers, with a zero in it
        damaged(where, f"no tensor has the shape {short(shape)} ({one_line(err)})")


def _sizes(value: Any) -> bool:
    """Whether this is a list of integers not below zero."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def record_of(raw: Raw, where: str) -> dict[str, Any]:
    """The record of a file, with the hash of its tensors as ``content``.

    Raises:
        DamagedError: it was changed.
        ShardError: it is undamaged, but of another format version.
    """
    return unseal(raw.sealed.encode("utf-8", "surrogatepass"), FORMAT_VERSION, f"{where} (metadata)")


def unpack(data: bytes | Reader, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a file of which nothing else tells a hash; both are exactly what was written.

    Raises:
        DamagedError: it is a pickle, a zip, torn, flipped, hostile, or not written by dbtrain.
        ShardError: it is undamaged, but of another format version.
    """
    raw = read_raw(BytesReader(data) if isinstance(data, bytes) else data, where)
    record = record_of(raw, where)
    if content_hash(raw.tensors) != record.pop("content", None):
        damaged(where, "the tensors do not match the hash in its metadata (a flipped bit)")
    return raw.tensors, record


def sealed_record(header: Any, where: str) -> str:
    """The record's text."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    record = metadata.get(RECORD_KEY) if isinstance(metadata, dict) else None
    if not isinstance(record, str):
        damaged(where, f"no {RECORD_KEY!r} record in its metadata {short(metadata)}, so dbtrain did not write it")
    return record


def refuse_pickle(start: bytes, where: str) -> None:
    """Say so by name; the ninth byte tells a pickle from a
    safetensors header whose length happens to look like one."""
    is_pickle = len(start) > 1 and start[0] == 0x80 and start[1] in PICKLE_PROTOCOLS and start[8:9] != b"{"
    if is_pickle or start.startswith(ZIP_MAGIC):
        kind = "pickle" if is_pickle else "zip (a pickle of torch.save inside)"
        damaged(where, f"it is a {kind}, dbtrain never reads those")
