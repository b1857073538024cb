"""What a data set holds, as one hash: it ties a run to its data, wherever they lie."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

PIECE = 1 << 20
"""Bytes of a file that are read at once."""


def tensors_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and contents of CPU tensors in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
