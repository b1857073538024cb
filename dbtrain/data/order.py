"""Which samples make the batch of a step: a pure function, the same on every worker."""

import torch
from torch import Tensor

from dbtrain.method.draws import derive_seed


class EpochOrder:
    """Samples in a new random order every epoch, without replacement.

    Args:
        size: samples in the split.
        batch_size: effective batch, over all workers of the block and all micro-batches.
        seed: of the run and the block.
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
