"""What a data set holds, as one hash: it ties a run to its data, wherever they lie."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from dbtrain.method.content import content_hash

PIECE = 1 << 20
"""Bytes of a file that are read at once."""


def samples_hash(splits: Iterable[tuple[Tensor, Tensor]]) -> str:
    """SHA-256 of samples (n, ...) and labels (n,) of each split, as 64 hexadecimal digits."""
    names = ("samples", "labels")
    parts = ((index, *part) for index, split in enumerate(splits) for part in zip(names, split, strict=True))
    return content_hash({f"{index}.{name}": tensor for index, name, tensor in parts})


def file_hash(file: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
