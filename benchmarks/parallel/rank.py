"""One process of a job: python -m benchmarks.parallel.rank FOLDER RANK ADDRESS PORT."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore

from benchmarks.parallel.job import ISOLATED, Job
from benchmarks.parallel.meter import Enough, Meter, meet

MEET_S = 600.0
"""For which a process waits for the others, which may compile."""


def work(job: Job, rank: int, store: TCPStore) -> dict[str, Any]:
    """Join the group, train, and say what was found."""
    device = torch.device(job.device, 0) if job.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(1)
    if job.device == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    # isolated blocks have a group each, and nothing that spans them
    members = job.workers if job.method == ISOLATED else job.processes
    group, own = divmod(rank, members)
    os.environ |= {"RANK": str(own), "WORLD_SIZE": str(members), "LOCAL_RANK": "0", "DS_ACCELERATOR": job.device}
    backend, limit = ("nccl" if job.device == "cuda" else "gloo"), timedelta(seconds=MEET_S)
    meeting = HashStore() if members == 1 else PrefixStore(f"group-{group}", store)
    dist.init_process_group(backend, store=meeting, rank=own, world_size=members, timeout=limit)
    meter = Meter(job, store, device, members)
    if job.method == ISOLATED:
        from benchmarks.parallel import isolated

        return _until_enough(meter, lambda: isolated.train(job, group, own, meter))
    return _until_enough(meter, lambda: _steps(job, rank, device, meter))


def _steps(job: Job, rank: int, device: torch.device, meter: Meter) -> None:
    from benchmarks.parallel.setting import Setting
    from dbtrain.run.run import Run
    from dbtrain.shards.storage.store import Store

    step = _method(job.method)(Setting(job, Run(Store(job.config().run_url)).plan, rank, device))
    while True:
        meter.before_step()
        step()


def _method(name: str) -> Callable[[Any], Callable[[], None]]:
    """Imported when it is asked for: DeepSpeed takes seconds."""
    if name == "zero3":
        from benchmarks.parallel.zero3 import zero3

        return zero3
    if name in ("1f1b", "interleaved"):
        from benchmarks.parallel import pipelines

        return pipelines.one_f_one_b if name == "1f1b" else pipelines.interleaved
    from benchmarks.parallel import data_parallel

    return getattr(data_parallel, name)


def _until_enough(meter: Meter, train: Callable[[], None]) -> dict[str, Any]:
    try:
        train()
    except Enough:
        return meter.found
    raise AssertionError("a meter ends every training")


def _memory_ran_out(error: BaseException | None) -> bool:
    """Whether it, or what it came from, says so: pipelines wrap what their stages raise."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    folder, rank, address, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    job = Job.read(folder / "job.json")
    limit = timedelta(seconds=MEET_S)
    store = TCPStore(address, port, job.processes, is_master=rank == 0, timeout=limit)
    try:
        found = work(job, rank, store)
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found = {"error": "out of memory" if _memory_ran_out(error) else said}
    (folder / f"rank-{rank}.json.part").write_text(json.dumps(found))
    (folder / f"rank-{rank}.json.part").rename(folder / f"rank-{rank}.json")
    sys.stdout.flush()
    if "error" not in found:
        meet(store, job.processes, "end")  # the first process holds the store for all
    os._exit(1 if "error" in found else 0)  # a process group of which a member is gone waits for it at its end


if __name__ == "__main__":
    main()
