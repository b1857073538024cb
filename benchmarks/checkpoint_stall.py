"""What commits cost the training: step time with and without them, in turn, in one process on the CPU.

Command:  OMP_NUM_THREADS=1 python benchmarks/checkpoint_stall.py [--every 10] [--turns 5]
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field

import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from dbtrain.config import load_config
from dbtrain.run.batch_shape import cut_batch
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import EventLog, read_events
from dbtrain.training.assignment import Assignment
from dbtrain.training.batches import Batches
from dbtrain.training.engine import Engine
from dbtrain.training.entry import prepare_process
from dbtrain.training.loop import train
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker

MODEL = [
    "blocks=1",
    "model.depth=6",
    "model.dim=512",
    "model.heads=8",
    "training.batch_size=32",
    "noise.ranges=uniform",
]
NEVER = 10**9


@dataclass
class Watched:
    """A worker that also keeps the seconds of each step; a commit's time on the training thread is in the next."""

    worker: BlockWorker
    seconds: list[float] = field(default_factory=list)

    def before_step(self, step: int) -> None:
        self.worker.before_step(step)

    def see_loss(self, step: int, loss: Tensor) -> Tensor:
        return loss

    def progress(self, step: int, loss: float, seconds: float, steps: int) -> None:
        self.seconds.append(seconds / steps)

    def commit(self, step: int, parts: dict[str, dict[str, Tensor]], loss: float) -> None:
        self.worker.commit(step, parts, loss)


def make_worker(folder: str, threads: int) -> tuple[BlockWorker, Engine, Batches]:
    """A worker of a settled run, as the coordinator would start it, but in this process."""
    config = load_config("configs/vit_digits.yaml", [f"out={folder}", "name=run", "training.log_every=1", *MODEL])
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), lambda *_: {})
    claim(run.child("blocks", "00"), 1, "token")
    told = Assignment(run.url, 0, 1, "token", "session", 1, None, "cpu", threads, 600.0)
    prepare_process(told)
    worker = BlockWorker(told, 0, StopRequest(), EventLog(run.child("blocks", "00", "attempts", "1")))
    shape = cut_batch(config.training.batch_size, 1, None)
    engine = Engine(worker.run_plan.objective(0), config.training, shape.micro_batch, shape.accumulation, 1)
    return worker, engine, Batches(worker.run_plan.data().train, shape, config.seed, 0, 0, worker.device)


def arm(worker: BlockWorker, engine: Engine, batches: Batches, start: int, steps: int, every: int) -> float:
    """Mean seconds of a step; the first one, which waits for what the arm before left, is not counted."""
    config = worker.config.training.model_copy(update={"steps": start + steps, "checkpoint_every": every})
    watched = Watched(worker)
    train(engine, batches, config, start, watched, lambda step: False)
    worker.writer.drain()
    return statistics.mean(watched.seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    console, steps, start = Console(width=110), 2 * given.every + 2, 0
    with tempfile.TemporaryDirectory() as folder:
        worker, engine, batches = make_worker(folder, given.threads)
        count = sum(tensor.numel() for tensor in engine.snapshot()["model"].values())
        ratios, plain = [], []
        arm(worker, engine, batches, start, steps, NEVER)
        for turn in range(given.turns):
            order = (NEVER, given.every) if turn % 2 else (given.every, NEVER)
            times = {}
            for every in order:
                start += steps
                times[every] = arm(worker, engine, batches, start, steps, every)
            plain.append(times[NEVER])
            ratios.append(times[given.every] / times[NEVER])
        before = time.monotonic()
        engine.snapshot()
        snapshot = time.monotonic() - before
        written = [e["seconds"] for e in read_events(worker.log.store) if e["event"] == "commit"]
    console.print(
        f"{count:,} parameters, {given.threads} thread(s); step without commits {statistics.median(plain):.4f} s; "
        f"with a commit every {given.every} steps the step takes {statistics.median(ratios):.4f} times that "
        f"(median of {given.turns} pairs, {min(ratios):.4f} to {max(ratios):.4f}); a snapshot stops training for "
        f"{snapshot:.4f} s, a commit is written in the background in {statistics.median(written):.2f} s"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
