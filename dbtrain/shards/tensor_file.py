"""Tensor files that users bring: safetensors and .npy. Pickles are refused by name, never opened."""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dbtrain.errors import DataError
from dbtrain.shards.faults import one_line


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file by name, or the array of a ``.npy`` file under the file's stem.

    Raises:
        DataError: the file is missing, damaged, of another kind, or holds Python objects.
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
            return {path.stem: torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))}
    except Exception as error:  # whatever the libraries raise on hostile bytes
        raise DataError(f"{path} cannot be read as a {path.suffix} file: {one_line(error)}") from error
