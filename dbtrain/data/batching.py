"""How samples become batches: which samples a step takes, on which device, and how training images are
varied."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dbtrain.method.draws import Draws, derive_seed


class EpochOrder:
    """Samples in a new random order every epoch, without replacement.

    Args:
        size: samples in the split.
        batch_size: effective batch, over all workers of the block and all micro-batches.
        seed: seed of the run and the block.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int, positions: range) -> Tensor:
        """Sample numbers (len(positions),) of these positions of the effective batch at `step`."""
        first = step * self.batch_size
        return self._samples(first + positions.start, first + positions.stop)

    def _samples(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.size)
            count = min(stop - start, self.size - offset)
            parts.append(self._permutation(epoch)[offset : offset + count])
            start += count
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return self._order


def blank(shape: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    """The tensors of a batch of `count` samples, filled with zeros, as a data set of this shape makes them.

    Args:
        shape: of the data set: ``image`` (C, H, W) for images with labels, or with ``text`` (L, D) for images
            with captions; ``length`` for token sequences.
        count: samples.
    """
    if "text" in shape:
        length = shape["text"][0]
        told = {"text": torch.zeros(count, *shape["text"]), "mask": torch.ones(count, length, dtype=torch.bool)}
        return {"image": torch.zeros(count, *shape["image"]), **told}
    if "image" in shape:
        return {"image": torch.zeros(count, *shape["image"]), "label": torch.zeros(count, dtype=torch.int64)}
    return {"tokens": torch.zeros(count, shape["length"], dtype=torch.int64)}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for a GPU's queue to run empty.

    A plain ``.to`` from pageable memory waits for everything that was given to the GPU before it, and the
    next step's launches then come late. A CPU tensor that goes to a GPU is therefore copied to pinned memory
    first.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


SHIFT_STREAM, FLIP_STREAM = 0, 1
"""Streams of the draws that vary images; these draws have a key of their own."""
BLACK = -1.0


def shift(image: Tensor, pixels: int, draws: Draws) -> Tensor:
    """Move each of the images (N, C, H, W) by up to `pixels` down or up and right or left;
    what comes in is black."""
    height, width = image.shape[2:]
    padded = functional.pad(image, [pixels] * 4, value=BLACK)
    start = (draws.uniform((2,), SHIFT_STREAM) * (2 * pixels + 1)).long()
    rows = start[:, 0, None] + torch.arange(height, device=image.device)
    columns = start[:, 1, None] + torch.arange(width, device=image.device)
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def flip(image: Tensor, draws: Draws) -> Tensor:
    """Mirror about half of the images (N, C, H, W), left to right."""
    mirrored = draws.uniform((), FLIP_STREAM) < 0.5
    return torch.where(mirrored[:, None, None, None], image.flip(-1), image)
