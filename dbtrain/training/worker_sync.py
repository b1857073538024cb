"""What the workers of one block agree on: where they resume,
the loss of a step, and whether to stop after it.

No group spans two blocks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dbtrain.training.watchdog import StopRequest

REASON_BYTES = 64
"""Length of the reason to stop that workers tell each other; the reason of a signal is its name."""


class WorkerSync:
    """The view that all workers of a block have of its step.

    Args:
        workers: number of workers of the block, in the default process group.
        stop: stop request of this worker; holds the block's reason once they stop.
        device: device of the worker.
    """

    def __init__(self, workers: int, stop: StopRequest, device: torch.device) -> None:
        self.workers = workers
        self.stop = stop
        self.device = device
        self._asked: Tensor | None = None

    def from_first(self, said: bytes) -> bytes:
        """What the first worker says; the others give as many bytes, which are ignored. A collective."""
        shared = torch.tensor(list(said), dtype=torch.uint8, device=self.device)
        dist.broadcast(shared, src=0)
        return bytes(shared.tolist())

    def mean(self, loss: Tensor) -> Tensor:
        """The mean over the workers: all of them must see the same, or one would go on where another ends.

        With it goes the number of workers that were asked to stop, so that both cost one collective.
        """
        if self.workers == 1:
            return loss
        shared = torch.stack([loss, torch.full_like(loss, self.stop.requested)])
        dist.all_reduce(shared)
        self._asked = shared[1]
        return shared[0] / self.workers

    def average(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the workers, beside the steps; a collective."""
        if self.workers == 1:
            return value
        shared = value.clone()
        dist.all_reduce(shared)
        return shared / self.workers

    def stops(self) -> bool:
        """Whether all leave after the step whose loss :meth:`mean` saw last:
        some worker was asked to by then."""
        if self.workers == 1:
            return self.stop.requested
        # reading it waits for the step, as the draw of the next batch does anyway
        if self._asked is None or not self._asked.item():
            return False
        self._share_reason()
        return True

    def _share_reason(self) -> None:
        """Workers that were not asked learn why they stop: the first one tells it,
        and may not be the one that was."""
        mine = (self.stop.reason or "").encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
        sent = torch.tensor(list(mine), dtype=torch.uint8, device=self.device)
        told = [torch.empty_like(sent) for _ in range(self.workers)]
        dist.all_gather(told, sent)
        reasons = [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in told]
        self.stop.request(next((reason for reason in reasons if reason), "stop"))
