"""Tensors of a safetensors file by name, one at a time; its header tells what is there."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dbtrain.data.content import file_hash
from dbtrain.shards.checksummed_json import unseal
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.safetensors_file import FORMAT_VERSION, RECORD_KEY, refuse_pickle
from dbtrain.shards.storage.errors import damaged, one_line
from dbtrain.shards.storage.store import Store

FLOATS = ("F64", "F32", "F16", "BF16")
"""Safetensors' names of the types that become float32 weights."""


@dataclass(frozen=True)
class Described:
    """A tensor as the header of its file tells it."""

    file: str
    """Name of the file below its directory."""
    shape: tuple[int, ...]
    dtype: str
    """Safetensors' name of it, such as `F32`."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself; no tensor was read for it."""

    tensors: Mapping[str, Described]
    record: Mapping[str, Any]
    """Record that dbtrain wrote; empty if the file is not from dbtrain."""
    sha256: str
    """Hash of the whole file, '' unless it was asked for."""


def read_header(store: Store, name: str, hashed: bool = False) -> Header:
    """Names, shapes and types in a file, and its record if dbtrain wrote it.

    Args:
        hashed: also read the whole file once, a piece at a time, for its SHA-256.

    Raises:
        MissingError: there is no such file.
        DamagedError: it is no safetensors file, or a pickle, or its record was edited.
    """
    where = store.where(name)
    with store.open_local(name) as path, _opened(path, where) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
        tensors = {key: Described(name, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
        sealed = (file.metadata() or {}).get(RECORD_KEY)
        record = unseal(sealed.encode(), FORMAT_VERSION, f"{where} (metadata)") if sealed else {}
        return Header(tensors, record, file_hash(path) if hashed else "")


def read_tensors(store: Store, name: str, sha256: str, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Float32 tensors of a file, one after the other, under names of the caller's.

    Args:
        sha256: that the file must have.
        names: what to call each tensor that is wanted, by its name; those that the file lacks are left out.

    Raises:
        MissingError: there is no such file.
        DamagedError: the file is another one, or a value is NaN or infinite.
    """
    where = store.where(name)
    with store.open_local(name) as path, _opened(path, where) as file:
        actual = file_hash(path)
        if actual != sha256:
            damaged(where, f"its SHA-256 is {actual[:16]}, and {sha256[:16]} was expected")
        for source in sorted(names.keys() & set(file.keys())):
            tensor = file.get_tensor(source).to(torch.float32)
            refuse_non_finite({source: tensor}, where)
            yield names[source], tensor


@contextlib.contextmanager
def _opened(path: Path, where: str) -> Iterator[Any]:
    with path.open("rb") as file:
        refuse_pickle(file.read(16), where)
    try:
        opened = safe_open(path, framework="pt")
    except Exception as err:  # whatever the library says to hostile bytes
        damaged(where, f"it is no safetensors file ({one_line(err)})")
    with opened as file:
        yield file
