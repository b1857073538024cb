"""One hash for what tensors hold, such as those of a shard, a codebook or a data set."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and content of a tensor of any shape,
    as 64 hex digits; the device does not matter."""
    return content_hash({"": tensor})


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and contents, whatever the order of the mapping."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
