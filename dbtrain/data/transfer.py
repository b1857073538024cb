"""From the host's memory to a device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for a GPU's queue to run empty.

    A plain ``.to`` from pageable memory waits for everything that was given to the GPU before it, and the next step's
    launches then come late. A CPU tensor that goes to a GPU is therefore copied to pinned memory first.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
