"""Tensor files that users bring: safetensors and .npy. Pickles are refused by name, never opened."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dbtrain.errors import DataError
from dbtrain.shards.safetensors_file import HEADER_LIMIT, layout
from dbtrain.shards.storage.errors import one_line

NUMBERS = "biufc"
"""NumPy's kinds of dtypes that a tensor can have."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file by name, or the array of a ``.npy`` file under the file's stem.

    Raises:
        DataError: the file is missing, damaged, of another kind, or holds something else than numbers.
    """
    if path.suffix not in (".safetensors", ".npy"):
        raise DataError(
            f"{path} must be a .safetensors or .npy file: other formats may be pickles, which are never read; convert "
            "it with safetensors.torch.save_file"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            more = file.read(1)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        tensor = torch.from_numpy(native) if array.dtype.kind in NUMBERS else None
    except Exception as error:  # whatever the libraries raise on hostile bytes
        raise DataError(f"{path} cannot be read as a {path.suffix} file: {one_line(error)}") from error
    if tensor is None:
        raise DataError(
            f"{path} holds {array.dtype}, not numbers: save numbers in it; of classes those from 0, as int64"
        )
    if more:
        raise DataError(f"{path} goes on after its array, as if several were saved into it: save one array in it")
    return {path.stem: tensor}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file by name, mapped into memory: pages are read when they are asked for.

    They are read only, and the file must stay as it is.

    Raises:
        DataError: the file is missing, damaged or of another kind.
    """
    if path.suffix != ".safetensors":
        raise DataError(f"{path} must be a .safetensors file: other formats may be pickles, which are never read")
    try:
        # not by the library, which maps in a way that the kernel refuses of files larger than the memory
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - length
            if not 0 < length <= HEADER_LIMIT or size < 0:
                raise DataError(f"a header of {length} bytes does not fit into it")
            header = json.loads(file.read(length))
        entries = list(layout(header, size, str(path)))
        offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: _mapped(path, 8 + length + offsets[name][0], dtype, shape) for name, dtype, shape in entries}
    except Exception as error:  # whatever the libraries raise on hostile bytes
        raise DataError(f"{path} cannot be read as a .safetensors file: {one_line(error)}") from error


def _mapped(path: Path, start: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    # read only: the kernel refuses a private mapping that is larger than the memory
    mapped = np.memmap(path, np.uint8, "r", offset=start, shape=(count,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(mapped).view(dtype).reshape(shape)
