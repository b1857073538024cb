"""Tensor files that users bring: safetensors and .npy. Pickles are refused by name, never opened."""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dbtrain.errors import DataError
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
