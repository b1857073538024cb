"""Micro-batches of one worker: a function of (seed, block, step, rank)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.data.order import EpochOrder
from dbtrain.data.splits import Split
from dbtrain.errors import ConfigError
from dbtrain.method.draws import derive_seed


@dataclass(frozen=True)
class BatchShape:
    """How the effective batch is cut: workers x accumulation x micro-batch."""

    workers: int
    accumulation: int
    micro_batch: int

    @property
    def batch_size(self) -> int:
        """Samples of a step."""
        return self.workers * self.accumulation * self.micro_batch


def cut_batch(batch_size: int, workers: int, micro_batch: int | None) -> BatchShape:
    """Cut an effective batch.

    Raises:
        ConfigError: it cannot be cut evenly.
    """
    if batch_size % workers:
        raise ConfigError(f"training.batch_size={batch_size} cannot be shared by {workers} workers: make it a multiple")
    share = batch_size // workers
    micro = micro_batch or share
    if share % micro:
        raise ConfigError(
            f"micro_batch={micro} does not divide a worker's share of {share} samples "
            f"(training.batch_size={batch_size} over {workers} workers)"
        )
    return BatchShape(workers, share // micro, micro)


class Feed:
    """Data and randomness of the steps of one worker.

    Args:
        split: training samples.
        shape: how the batch is cut.
        seed, block: of the run.
        rank: of this worker within its block.
        device: where batches go.
    """

    def __init__(self, split: Split, shape: BatchShape, seed: int, block: int, rank: int, device: torch.device) -> None:
        self.split = split
        self.shape = shape
        self.seed = seed
        self.block = block
        self.rank = rank
        self.device = device
        self._order = EpochOrder(len(split), shape.batch_size, derive_seed(seed, "order", block))

    def micro_batches(self, step: int) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """(batch, key, positions) for each accumulation of `step`; also seeds dropout, which follows the layout."""
        key = torch.tensor(derive_seed(self.seed, "noise", self.block, step), device=self.device)
        first = self.rank * self.shape.accumulation * self.shape.micro_batch
        for micro in range(self.shape.accumulation):
            start = first + micro * self.shape.micro_batch
            positions = range(start, start + self.shape.micro_batch)
            torch.manual_seed(derive_seed(self.seed, "dropout", self.block, step, self.rank, micro))
            batch = self.split.batch(self._order.indices(step, positions), self.device)
            yield batch, key, torch.arange(start, start + self.shape.micro_batch, device=self.device)
