"""dbtrain's own: each process is a worker as `dbtrain train` starts it, but for Ray, and knows of no other."""

from typing import Any
from unittest import mock

from benchmarks.parallel.job import Job
from benchmarks.parallel.meter import Meter
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from dbtrain.training import entry
from dbtrain.training.assignment import Assignment
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker

HANG_S = 3600.0


def train(job: Job, block: int, rank: int, meter: Meter) -> None:
    """Train a block of the prepared run, as one of its ranks, until the meter has seen enough.

    Raises:
        RuntimeError: the worker ended before.
    """

    class Metered(BlockWorker):
        """The worker, whose steps are measured."""

        def before_step(self, step: int) -> None:
            super().before_step(step)
            meter.before_step()

    run = Run(Store(job.config().run_url))
    device: Any = job.device
    assignment = Assignment(
        run.store.url, block, 1, "benchmark", "benchmark", job.workers, job.micro_batch, device, 1, HANG_S
    )
    with mock.patch.object(entry, "BlockWorker", Metered):
        entry.work(assignment, rank, StopRequest())
    raise RuntimeError(f"the worker of block {block} ended before it was measured: see its events in {run.store.url}")
