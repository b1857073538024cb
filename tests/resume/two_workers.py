"""Run by torchrun: one attempt of block 0 by its workers, who may each see the shared storage differently.

Arguments: URL of the run, number of the attempt, and a step that the second worker's listing lacks, 0 for none.
"""

import sys
from datetime import timedelta

import torch.distributed as dist

from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.store import Store
from dbtrain.training.assignment import Assignment
from dbtrain.training.entry import work
from dbtrain.training.watchdog import StopRequest
from tests.process_group import process_group


def hide(step: int) -> None:
    listing = Checkpoints.steps
    Checkpoints.steps = lambda self: [s for s in listing(self) if s != step]  # type: ignore[method-assign]


def main(url: str, attempt: int, hidden: int) -> None:
    rank = dist.get_rank()
    if rank == 0:
        claim(Store(url).child("blocks", "00"), attempt, str(attempt))
    dist.barrier()
    if rank == 1 and hidden:
        hide(hidden)
    workers = dist.get_world_size()
    work(Assignment(url, 0, attempt, str(attempt), "session", workers, None, "cpu", 1, 60.0), rank, StopRequest())


if __name__ == "__main__":
    with process_group(timedelta(seconds=60)):
        main(sys.argv[1], *map(int, sys.argv[2:]))
