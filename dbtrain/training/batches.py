"""Micro-batches of one worker: a function of (seed, block, step, rank)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dbtrain.config import AugmentationConfig
from dbtrain.data.batching import EpochOrder, flip, shift
from dbtrain.data.splits import Split, spread
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.run.batch_shape import BatchShape, check_augmentation

FIXED = 1024
"""Samples at most of a measurement beside the training, but for a batch of each worker."""


class Batches:
    """Data and randomness of the steps of one worker.

    Args:
        split: training samples.
        shape: how the batch is cut.
        seed, block: seed of the run, and number of the block.
        rank: rank of this worker within its block.
        device: where batches go.
        augmentation: augmentation of images.

    Raises:
        ConfigError: the samples to be augmented are no images.
    """

    def __init__(
        self,
        split: Split,
        shape: BatchShape,
        seed: int,
        block: int,
        rank: int,
        device: torch.device,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        self.augmentation = augmentation or AugmentationConfig()
        check_augmentation(self.augmentation, split)
        self.split = split
        self.shape = shape
        self.seed = seed
        self.block = block
        self.rank = rank
        self.device = device
        self._order = EpochOrder(len(split), shape.batch_size, derive_seed(seed, "order", block))

    def micro_batches(self, step: int) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """(batch, key, positions) for each accumulation of `step`;
        also seeds dropout, which follows the layout."""
        key = self._key("noise", step)
        first = self.rank * self.shape.accumulation * self.shape.micro_batch
        for micro in range(self.shape.accumulation):
            start = first + micro * self.shape.micro_batch
            positions = range(start, start + self.shape.micro_batch)
            torch.manual_seed(derive_seed(self.seed, "dropout", self.block, step, self.rank, micro))
            batch = self.split.batch(self._order.indices(step, positions), self.device)
            where = torch.arange(start, start + self.shape.micro_batch, device=self.device)
            yield self._augmented(batch, step, where), key, where

    def fixed(self, split: Split) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """(batch, key, positions) of this worker's part of some samples of a split, spread evenly over it.

        Samples, levels and noise are the same at every call. All batches have the size of those that are
        trained, for which the model may be compiled; of few samples some come twice then.
        """
        size = self.shape.micro_batch
        count = max(1, min(len(split), FIXED) // (size * self.shape.workers))
        key = self._key("fixed", 0)
        for first in range(self.rank * count, (self.rank + 1) * count):
            positions = torch.arange(first * size, (first + 1) * size)
            samples = spread(len(split), count * size * self.shape.workers)[positions]
            yield split.batch(samples, self.device), key, positions.to(self.device)

    def _key(self, purpose: str, step: int) -> Tensor:
        # filled on the device: a tensor made from a number here would be copied there,
        # which waits for the GPU
        return torch.full((), derive_seed(self.seed, purpose, self.block, step), dtype=torch.int64, device=self.device)

    def _augmented(self, batch: dict[str, Tensor], step: int, positions: Tensor) -> dict[str, Tensor]:
        pixels, mirror = self.augmentation.shift, self.augmentation.flip
        if not (pixels or mirror):
            return batch
        key = self._key("augmentation", step)
        draws, image = Draws(key, positions), batch["image"]
        image = shift(image, pixels, draws) if pixels else image
        return {**batch, "image": flip(image, draws) if mirror else image}
