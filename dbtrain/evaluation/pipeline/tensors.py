"""Tensors on their way between processes: bytes that Ray's shared memory takes as they are."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A tensor's bytes, in an array that is sent without another copy."""

    content: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(tensor: Tensor) -> Packed:
    """The tensor, from whatever device it is on."""
    here = tensor.detach().cpu().contiguous()
    return Packed(here.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))


def unpack(packed: Packed, device: torch.device) -> Tensor:
    """The tensor, on this device."""
    if not packed.content.size:  # which PyTorch cannot see as another type
        return torch.empty(packed.shape, dtype=packed.dtype, device=device)
    # what was sent cannot be written to, and PyTorch has no such tensors
    content = torch.from_numpy(packed.content.copy())
    return content.view(packed.dtype).reshape(packed.shape).to(device)
