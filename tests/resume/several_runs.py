"""Run by torchrun: one attempt of each of several blocks, one after the other, by the same workers.

Arguments: number of the attempt, and the blocks as BLOCK:URL of the run.
"""

import sys
from datetime import timedelta

import torch.distributed as dist

from dbtrain.run.run import Run
from dbtrain.shards.storage.fence import claim
from dbtrain.training.assignment import Assignment
from dbtrain.training.entry import work
from dbtrain.training.watchdog import StopRequest
from tests.process_group import process_group


def main(attempt: int, jobs: list[str]) -> None:
    rank, workers = dist.get_rank(), dist.get_world_size()
    for block, url in (job.split(":", 1) for job in jobs):
        if rank == 0:
            claim(Run.at(url).block(int(block)).store, attempt, str(attempt))
        dist.barrier()
        told = Assignment(url, int(block), attempt, str(attempt), "session", workers, None, "cpu", 1, 60.0)
        work(told, rank, StopRequest())


if __name__ == "__main__":
    with process_group(timedelta(seconds=60)):
        main(int(sys.argv[1]), sys.argv[2:])
